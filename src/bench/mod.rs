//! What `thaw bench` measures, on the real thing: a server of its own, real VMs, the real API.
//!
//! Absolute times belong to one machine on one day, so every result carries the host's facts
//! and the number of samples, and what is compared is measured in turn in one run.

pub mod cases;
pub mod facts;
pub mod forks;
pub mod peer;
pub mod restore;
pub mod samples;
pub mod server;
pub mod streams;
pub mod tapes;
pub mod vcpus;
