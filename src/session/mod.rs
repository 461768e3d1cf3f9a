//! Sessions: a tenant's name for one VM over time.
//!
//! [`Sessions`] is the whole of it to the outside. Inside:
//!
//! * `table`: who owns which session;
//! * `line`, `session`, `live`: the order of a session's commands, and its VM;
//! * `start`: admission (`limits`), claim (`pool`), renewal;
//! * `execute`, `output`: one command;
//! * `pool`, `refill`, `breaker`, `reaper`: VMs before and after their sessions;
//! * `vms`: the session's VM as something that is started, frozen and resumed by itself;
//! * [`VmWatch`]: the seam towards whoever keeps account of VMs;
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
mod room;
mod rows;
#[allow(clippy::module_inception)]
mod session;
mod sessions;
mod share;
mod start;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod types;
mod vm;
mod vms;
mod watch;
mod workers;

pub use config::{PoolConfig, SessionConfig};
pub use execute::Accepted;
pub use feed::{Feed, Follower, Output};
pub use process::{Attender, ProcessEvent, ProcessHandle, ProcessInput, Sleeper};
pub use room::RoomWanted;
pub use rows::{NoRows, SessionRow, SessionRows};
pub use session::Attendance;
pub use sessions::Sessions;
pub use start::Begin;
pub use types::*;
pub use vm::{Channel, Frozen, Input, Run, RunEvent, Shape, Vm, VmFigures, VmSource};
pub use vms::Usage;
pub use watch::{Next, NoWatch, Parting, Step, VmEnd, VmStarted, VmWatch};
pub use workers::Workers;
