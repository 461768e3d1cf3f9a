//! thaw runs short commands on warm microVMs.
//!
//! * [`cli`]: one file per command;
//! * [`config`]: every key, its default and its doc;
//! * [`http`]: the front end;
//! * [`session`]: who owns which VM, in what order its commands run, and the pool;
//! * [`task`]: the durable queue of asynchronous commands;
//! * [`store`]: what outlives the server, in SQLite;
//! * [`worker`]: `serve`'s end of a worker's socket;
//! * [`layers`]: the memory of frozen VMs, what they share and what they have of their own;
//! * [`image`] and [`template`]: what VMs are made of;
//! * [`backend`]: what the front end sees of the sessions;
//! * [`bench`]: what `thaw bench` measures.
#![forbid(unsafe_code)]

pub mod audit;
pub mod backend;
pub mod bench;
pub mod cli;
pub mod config;
pub mod http;
pub mod image;
pub mod layers;
pub mod session;
pub mod snapshots;
pub mod store;
pub mod tapes;
pub mod task;
pub mod template;
pub mod terminal;
pub mod vms;
pub mod worker;
