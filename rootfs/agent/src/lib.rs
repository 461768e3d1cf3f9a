//! PID 1 of a thaw guest.
//!
//! * [`boot`]: from an initramfs to a root that commands can live in;
//! * [`wire`] and [`doorbell`]: the way to the host, as the [`link`] that the engine sees;
//! * [`engine`]: orders, commands and their output;
//! * [`interpreter`]: the warm processes that run commands;
//! * [`process`], [`files`]: terminals, and work on files, beside the commands;
//! * [`identity`]: becoming a new individual after a restore.
//!
//! One thread, no allocation that the host or a command can make grow without bound, and every
//! unsafe block in [`sys`].
#![deny(unsafe_code)]

pub mod boot;
pub mod command;
pub mod console;
pub mod doorbell;
pub mod engine;
pub mod files;
pub mod identity;
pub mod interpreter;
pub mod limits;
pub mod link;
pub mod process;
pub mod rehearsal;
pub mod sys;
pub mod wire;

/// Where programs are found, for the agent and for every command.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
