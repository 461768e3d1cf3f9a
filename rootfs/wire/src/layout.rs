//! Where the rings are and how the doorbell is rung.
//!
//! The agent owns one **header page** and the pages of two rings, all pinned. It fills in
//! the header, then writes the header's page frame number to [`DOORBELL_PORT`]; that is the
//! handshake. From then on it writes [`KICK`] after putting frames in its ring. The host's
//! doorbell towards the guest is one interrupt, whose nature depends on the machine.
//!
//! All fields are little-endian. Ring positions are free-running `u32` byte counts: a ring
//! holds `head - tail` (wrapping) bytes, and a position's offset is `position % capacity`.

/// I/O port (32-bit `out`) that the agent rings. Port I/O leaves guest mode on every machine.
pub const DOORBELL_PORT: u16 = 0x7a0;

/// Doorbell word: "look at the ring". Any other word is the frame number of a header page.
pub const KICK: u32 = 0;

/// Xen virtual interrupt number by which a `pv` machine rings the agent: one of the numbers
/// reserved for architecture use (`VIRQ_ARCH_0` is 16), unused by Linux on x86.
pub const WIRE_VIRQ: u32 = 20;

/// First I/O port of the parallel port whose interrupt is how an `hvm` machine rings the agent, and its line: those of
/// a PC's first one, which the kernel's driver asks for by these numbers.
pub const BELL_PORT: u16 = 0x378;
/// See [`BELL_PORT`].
pub const BELL_LINE: u32 = 7;

/// What the agent says on the console when it is up in a guest that is to do nothing (`--idle`).
pub const IDLE: &str = "up and idle";

/// First field of a valid header page (`THAWWIRE`).
pub const MAGIC: u64 = u64::from_le_bytes(*b"THAWWIRE");

/// Version of everything in this crate. Both ends must have the same one.
pub const VERSION: u32 = 2;

/// Size of a guest page in bytes.
pub const PAGE: usize = 4096;

/// Most pages one ring may have: what fits the header page, and half a MiB, which already
/// moves more per doorbell than a doorbell costs.
pub const MAX_RING_PAGES: usize = 128;

/// Pages that the agent gives each ring: 256 KiB, two full stream windows.
pub const RING_PAGES: usize = 64;

/// Byte offsets of the header page's fields.
pub mod offset {
    /// `u64`, [`super::MAGIC`]; written by the guest.
    pub const MAGIC: usize = 0x00;
    /// `u32`, [`super::VERSION`]; written by the guest.
    pub const VERSION: usize = 0x08;
    /// `u32`, pages in each ring, a power of two up to [`super::MAX_RING_PAGES`]; written by the guest.
    pub const RING_PAGES: usize = 0x0c;
    /// `u64`, the VM's generation; written by the host before the guest first runs after a
    /// restore. A guest that finds another number than the one it shook hands under drops
    /// every stream and shakes hands again.
    pub const GENERATION: usize = 0x10;
    /// `u32`, guest-to-host head (bytes produced); written by the guest.
    pub const TO_HOST_HEAD: usize = 0x40;
    /// `u32`, guest-to-host tail (bytes consumed); written by the host.
    pub const TO_HOST_TAIL: usize = 0x80;
    /// `u32`, host-to-guest head (bytes produced); written by the host.
    pub const TO_GUEST_HEAD: usize = 0xc0;
    /// `u32`, host-to-guest tail (bytes consumed); written by the guest.
    pub const TO_GUEST_TAIL: usize = 0x100;
    /// `[u64; MAX_RING_PAGES]`, guest-physical addresses of the guest-to-host ring's pages.
    pub const TO_HOST_PAGES: usize = 0x200;
    /// `[u64; MAX_RING_PAGES]`, guest-physical addresses of the host-to-guest ring's pages.
    pub const TO_GUEST_PAGES: usize = 0x600;
}

const _: () = assert!(offset::TO_GUEST_PAGES + MAX_RING_PAGES * 8 <= PAGE);
const _: () = assert!(RING_PAGES.is_power_of_two() && RING_PAGES <= MAX_RING_PAGES);
