//! Takes the kernel's ELF file out of the self-extracting `bzImage` that distributions ship.
//!
//! The setup header (Linux, `Documentation/arch/x86/boot.rst`) says where the compressed kernel
//! lies: `payload_offset` and `payload_length`, relative to the protected-mode code that follows
//! the setup sectors.

use std::io::Read;

/// Largest kernel that is unpacked, in bytes: Debian's has about 60 MB.
const MAX_KERNEL: u64 = 512 << 20;

/// Why no kernel came out.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// No setup header.
    #[error("this is not a bzImage: {0}")]
    NotBzImage(&'static str),
    /// The header points outside the file.
    #[error("the bzImage is cut short: its payload ends at byte {end}, the file has {len}")]
    Short {
        /// Where the payload should end.
        end: u64,
        /// How long the file is.
        len: u64,
    },
    /// A compression that is not supported.
    #[error(
        "the kernel is compressed in an unknown way (it starts with {0}); xz and zstd are understood"
    )]
    Compression(String),
    /// Decompression failed.
    #[error("the kernel's payload is damaged: {0}")]
    Damaged(#[from] std::io::Error),
    /// What came out is no ELF file.
    #[error("the kernel's payload is not an ELF file")]
    NotElf,
    /// What came out is too large.
    #[error("the kernel is larger than {MAX_KERNEL} bytes")]
    TooLarge,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The compressed kernel within a bzImage.
fn payload(image: &[u8]) -> Result<&[u8], BzImageError> {
    let short = BzImageError::NotBzImage("it ends within its setup header");
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(BzImageError::NotBzImage("there is no setup header"));
    }
    let Some((version, offset, length)) = u16_at(image, 0x206)
        .zip(u32_at(image, 0x248))
        .zip(u32_at(image, 0x24c))
        .map(|((version, offset), length)| (version, u64::from(offset), u64::from(length)))
    else {
        return Err(short);
    };
    if version < 0x208 {
        return Err(BzImageError::NotBzImage(
            "its boot protocol is older than 2.08",
        ));
    }
    let sectors = match image[0x1f1] {
        0 => 4, // by the protocol: very old kernels
        count => u64::from(count),
    };
    let start = (sectors + 1) * 512 + offset;
    let end = start + length;
    image
        .get(start as usize..end as usize)
        .ok_or(BzImageError::Short {
            end,
            len: image.len() as u64,
        })
}

/// The ELF kernel within a bzImage.
///
/// # Errors
/// See [`BzImageError`].
pub fn extract(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let payload = payload(image)?;
    let mut kernel = Vec::new();
    let limit = MAX_KERNEL + 1;
    // The build appends the unpacked size to what the compressor wrote, so a decoder must stop at the stream's end.
    let read = if payload.starts_with(b"\xfd7zXZ\0") {
        liblzma::read::XzDecoder::new(payload)
            .take(limit)
            .read_to_end(&mut kernel)
    } else if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        zstd::stream::read::Decoder::new(payload)
            .and_then(|decoder| decoder.single_frame().take(limit).read_to_end(&mut kernel))
    } else {
        let magic = &payload[..payload.len().min(6)];
        return Err(BzImageError::Compression(hex::encode(magic)));
    };
    read?;
    if kernel.len() as u64 > MAX_KERNEL {
        return Err(BzImageError::TooLarge);
    }
    if !kernel.starts_with(b"\x7fELF") {
        return Err(BzImageError::NotElf);
    }
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 4 * 512 + 100];
        image[0x1f1] = 3;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"the rest of the image");
        image
    }

    fn xz(content: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(content).unwrap();
        let mut bytes = encoder.finish().unwrap();
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        bytes
    }

    fn zstd(content: &[u8]) -> Vec<u8> {
        let mut bytes = zstd::encode_all(content, 1).unwrap();
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        bytes
    }

    #[test]
    fn both_compressions_are_unpacked() {
        let kernel = [b"\x7fELF".as_slice(), &[7; 9000]].concat();
        assert_eq!(extract(&bzimage(&xz(&kernel))).unwrap(), kernel);
        assert_eq!(extract(&bzimage(&zstd(&kernel))).unwrap(), kernel);
    }

    #[test]
    fn damage_is_named() {
        let good = bzimage(&zstd(b"\x7fELF and so on"));
        assert!(matches!(
            extract(b"short"),
            Err(BzImageError::NotBzImage(_))
        ));
        assert!(matches!(
            extract(&good[..0x210]),
            Err(BzImageError::NotBzImage(_))
        ));
        assert!(matches!(
            extract(&good[..2150]),
            Err(BzImageError::Short { .. })
        ));
        let mut huge = good.clone();
        huge[0x248..0x250].fill(0xff);
        assert!(matches!(extract(&huge), Err(BzImageError::Short { .. })));
        assert!(matches!(
            extract(&bzimage(b"BZh9")),
            Err(BzImageError::Compression(_))
        ));
        assert!(matches!(
            extract(&bzimage(b"")),
            Err(BzImageError::Compression(_))
        ));
        assert!(matches!(
            extract(&bzimage(&zstd(b"text"))),
            Err(BzImageError::NotElf)
        ));
        let cut = xz(b"\x7fELF and so on");
        assert!(matches!(
            extract(&bzimage(&cut[..20])),
            Err(BzImageError::Damaged(_))
        ));
    }
}
