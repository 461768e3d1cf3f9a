//! thaw's virtual machine monitor: everything that touches KVM, and nothing that knows HTTP.
//!
//! * [`kvm`]: every ioctl, one place;
//! * [`memory`]: guest memory, and who wrote which page of it;
//! * [`machine`]: how a VM runs its kernel: the trait, and `pv`;
//! * [`wire`]: the host's end of the wire;
//! * [`snapshot`]: freezing a VM to files and thawing it again;
//! * [`jail`]: what a worker gives up before it runs a guest;
//! * [`protocol`]: what `thaw serve` and a worker say to each other;
//! * [`worker`]: the worker's main loop.

pub mod jail;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod protocol;
pub mod snapshot;
pub mod wire;
pub mod worker;
