//! Sessions: a tenant's name for one VM over time.
//!
//! [`Sessions`] is the whole of it to the outside. Inside:
//!
//! * `table`: who owns which session;
//! * `line`, `session`, `live`: the order of a session's commands, and its VM;
//! * `start`: admission (`limits`), claim (`pool`), renewal;
//! * `execute`, `output`: one command;
//! * `pool`, `refill`, `breaker`, `reaper`: VMs before and after their sessions;
//! * [`VmSource`] and [`Vm`]: the seam towards workers and machines; `workers` is the real one;
//! * [`SessionRows`]: the seam towards the store.

mod breaker;
mod config;
mod core;
mod execute;
mod feed;
mod identity;
mod limits;
mod line;
mod live;
mod metrics;
mod output;
mod pool;
mod process;
mod reaper;
mod refill;
mod rows;
#[allow(clippy::module_inception)]
mod session;
mod sessions;
mod start;
mod table;
#[cfg(test)]
mod tests;
mod types;
mod vm;
mod workers;

pub use config::{PoolConfig, SessionConfig};
pub use execute::Accepted;
pub use feed::{Feed, Follower, Output};
pub use process::{ProcessEvent, ProcessHandle, ProcessInput};
pub use rows::{NoRows, SessionRow, SessionRows};
pub use sessions::Sessions;
pub use types::*;
pub use vm::{Channel, Input, Run, RunEvent, Shape, Vm, VmSource};
pub use workers::Workers;
