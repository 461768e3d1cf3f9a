//! What the thread of a vCPU beyond the first does.

use std::sync::Arc;

use super::Shared;
use super::devices::Asked;
use crate::kvm::{InterruptHandle, Stop, Vcpu};
use crate::machine::Exit;
use crate::machine::crew::{Crew, Member};

/// A vCPU and what it shares.
#[derive(Debug)]
pub(super) struct OtherVcpu {
    pub vcpu: Vcpu,
    pub shared: Arc<Shared>,
}

impl Member for OtherVcpu {
    fn arrive(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    fn handle(&mut self) -> InterruptHandle {
        self.vcpu.interrupt_handle()
    }

    fn work(&mut self, crew: &Crew) -> Option<Exit> {
        while crew.goes() {
            let served = match self.vcpu.run() {
                Ok(Stop::Interrupted) => continue,
                Ok(stop) => self.shared.serve(&mut self.vcpu, stop),
                Err(error) => Err(error.into()),
            };
            match served {
                Ok(Asked::Doorbell(word)) => crew.post(Exit::Doorbell(word)),
                Ok(Asked::Reset) => return Some(self.shared.ended()),
                Ok(_) => {}
                Err(error) => return Some(Exit::Crashed(format!("{error:#}"))),
            }
        }
        None
    }

    fn settle(&mut self) -> anyhow::Result<()> {
        Ok(self.vcpu.settle()?)
    }
}
