//! The contract between thaw's host and the agent inside a guest.
//!
//! One **wire** joins them: two byte rings in guest memory, a doorbell each way,
//! and frames that carry many independent streams. This crate holds what both
//! ends must agree on and nothing that touches a device:
//!
//! * [`layout`]: the header page that describes the rings, and the doorbell's words;
//! * [`ring`]: reading and writing a ring whose other end cannot be trusted;
//! * [`frame`]: the frame header and its kinds;
//! * [`message`]: the JSON bodies of the frames that have one.
//!
//! The same frames travel between `thaw serve` and a worker over a unix socket, so a
//! worker relays streams without translating them.
#![forbid(unsafe_code)]

pub mod frame;
pub mod layout;
pub mod message;
pub mod ring;
