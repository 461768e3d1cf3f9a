//! The archive that the kernel unpacks as its first root: cpio, "newc" form, uncompressed.
//!
//! Each entry is a 110-byte header of ASCII hexadecimal fields, the name with a NUL, padding to
//! 4 bytes, the content, padding to 4 bytes; an entry called `TRAILER!!!` ends the archive
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::{self, Read, Write};

const MAGIC: &[u8; 6] = b"070701";
const HEADER: usize = 110;
const TRAILER: &str = "TRAILER!!!";
/// Longest name that is read back: the kernel's own bound.
const MAX_NAME: u64 = 4096;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
const SYMLINK: u32 = 0o120_000;

/// Writes an archive. Same calls, same bytes: there are no dates, and every entry belongs to root.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    inode: u32,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(to: W) -> Self {
        Self {
            to,
            inode: 0,
            written: 0,
        }
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// Writing failed.
    pub fn directory(&mut self, name: &str, permissions: u32) -> io::Result<()> {
        self.entry(
            name,
            DIRECTORY | permissions,
            2,
            (0, 0),
            0,
            &mut io::empty(),
        )
    }

    /// Adds a file with `bytes` of content from `content`.
    ///
    /// # Errors
    /// Reading or writing failed, or `content` has another length.
    pub fn file(
        &mut self,
        name: &str,
        permissions: u32,
        bytes: u64,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        self.entry(name, REGULAR | permissions, 1, (0, 0), bytes, content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// Writing failed.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(
            name,
            SYMLINK | 0o777,
            1,
            (0, 0),
            target.len() as u64,
            &mut target.as_bytes(),
        )
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// Writing failed.
    pub fn character_device(
        &mut self,
        name: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        self.entry(
            name,
            CHARACTER | permissions,
            1,
            (major, minor),
            0,
            &mut io::empty(),
        )
    }

    /// Ends the archive and gives back what it was written to.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.header(TRAILER, 0, 1, (0, 0), 0)?;
        // Whole blocks of 512, as other tools write.
        self.pad(512)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        bytes: u64,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        self.header(name, mode, links, device, bytes)?;
        let copied = io::copy(&mut content.take(bytes), &mut self.to)?;
        if copied != bytes {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{name} has {copied} bytes where {bytes} were announced"),
            ));
        }
        self.written += bytes;
        self.pad(4)
    }

    fn header(
        &mut self,
        name: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        bytes: u64,
    ) -> io::Result<()> {
        let bytes = u32::try_from(bytes).map_err(|_| {
            io::Error::other(format!(
                "{name} has {bytes} bytes; a cpio entry has at most 4 GiB"
            ))
        })?;
        self.inode = self.inode.wrapping_add(1);
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            bytes,
            0, // device that holds the file: major, minor
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum, unused in this form
        ];
        let mut header = Vec::with_capacity(HEADER + name.len() + 4);
        header.extend_from_slice(MAGIC);
        for field in fields {
            header.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        header.extend_from_slice(name.as_bytes());
        header.push(0);
        self.to.write_all(&header)?;
        self.written += header.len() as u64;
        self.pad(4)
    }

    fn pad(&mut self, to: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        io::copy(&mut io::repeat(0).take(missing), &mut self.to)?;
        self.written += missing;
        Ok(())
    }
}

/// An entry found by [`read`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Type and permissions.
    pub mode: u32,
    /// Length of its content.
    pub bytes: u64,
}

/// Goes through an archive. `visit` gets each entry and a reader of its content, which it may leave unread.
///
/// # Errors
/// Reading failed, `visit` failed, or this is no archive of this form.
pub fn read<R: Read>(
    from: R,
    mut visit: impl FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
) -> io::Result<()> {
    let mut from = Counted {
        inner: from,
        count: 0,
    };
    loop {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        if &header[..6] != MAGIC {
            return Err(malformed("no cpio header where one must be"));
        }
        let field = |index: usize| -> io::Result<u32> {
            std::str::from_utf8(&header[6 + index * 8..14 + index * 8])
                .ok()
                .and_then(|text| u32::from_str_radix(text, 16).ok())
                .ok_or_else(|| malformed("a field is not hexadecimal"))
        };
        let (mode, bytes, name_bytes) = (field(1)?, u64::from(field(6)?), u64::from(field(11)?));
        if name_bytes == 0 || name_bytes > MAX_NAME {
            return Err(malformed("a name has an impossible length"));
        }
        let mut name = vec![0; name_bytes as usize];
        from.read_exact(&mut name)?;
        name.pop();
        let name = String::from_utf8(name).map_err(|_| malformed("a name is not UTF-8"))?;
        from.skip_padding()?;
        if name == TRAILER {
            return Ok(());
        }
        let entry = Entry { name, mode, bytes };
        let mut content = (&mut from).take(bytes);
        visit(&entry, &mut content)?;
        let left = content.limit();
        if io::copy(&mut content, &mut io::sink())? != left {
            return Err(malformed("an entry is cut short"));
        }
        from.skip_padding()?;
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("not a newc cpio archive: {what}"),
    )
}

struct Counted<R> {
    inner: R,
    count: u64,
}

impl<R: Read> Counted<R> {
    fn skip_padding(&mut self) -> io::Result<()> {
        let mut rest = [0; 4];
        let missing = (self.count.next_multiple_of(4) - self.count) as usize;
        self.read_exact(&mut rest[..missing])
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.directory("dev", 0o755).unwrap();
        writer.character_device("dev/console", 0o600, 5, 1).unwrap();
        writer.file("init", 0o755, 5, &mut &b"hello"[..]).unwrap();
        writer.symlink("bin", "usr/bin").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let archive = sample();
        assert_eq!(archive.len() % 512, 0);
        assert_eq!(
            &archive[..116],
            b"070701\
            00000001000041ed00000000000000000000000200000000000000000000000000000000000000000000000000000004\
            00000000dev\0\0\0"
                .as_slice()
        );
        // Device numbers stand in the console's header.
        let console = 116;
        assert_eq!(
            &archive[console + 6 + 9 * 8..console + 6 + 11 * 8],
            b"0000000500000001"
        );
        assert_eq!(archive, sample());
    }

    #[test]
    fn what_was_written_is_read() {
        let mut seen = Vec::new();
        read(&sample()[..], |entry, content| {
            let mut text = String::new();
            content.read_to_string(&mut text)?;
            seen.push((entry.name.clone(), entry.mode, text));
            Ok(())
        })
        .unwrap();
        assert_eq!(
            seen,
            [
                ("dev".into(), 0o040_755, String::new()),
                ("dev/console".into(), 0o020_600, String::new()),
                ("init".into(), 0o100_755, "hello".into()),
                ("bin".into(), 0o120_777, "usr/bin".into()),
            ]
        );
    }

    #[test]
    fn content_may_stay_unread_and_damage_shows() {
        let archive = sample();
        let mut names = 0;
        read(&archive[..], |_, _| {
            names += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(names, 4);
        for cut in [0, 50, 115, 300] {
            assert!(
                read(&archive[..cut], |_, _| Ok(())).is_err(),
                "cut at {cut}"
            );
        }
        let mut damaged = archive;
        damaged[20] = b'x';
        assert!(read(&damaged[..], |_, _| Ok(())).is_err());
    }

    #[test]
    fn a_file_of_another_length_is_an_error() {
        let mut writer = Writer::new(Vec::new());
        assert!(writer.file("a", 0o644, 9, &mut &b"short"[..]).is_err());
    }
}
