//! What reaches the VMM through ports: the shim's calls, the doorbell, and what nobody may use.

use super::emulate::{self, Context, Effect};
use super::layout::*;
use super::{Exit, cpu::Cpu, guest};
use thaw_wire::layout::DOORBELL_PORT;

impl Cpu {
    /// A write to a port. `None`: go on.
    pub(super) fn port_written(&mut self, port: u16, value: u32) -> anyhow::Result<Option<Exit>> {
        self.at_port = true;
        let rip = self.vcpu.regs().rip;
        if port == DOORBELL_PORT && !in_shim(rip) {
            self.counts.doorbells += 1;
            return Ok(Some(Exit::Doorbell(value)));
        }
        if !in_shim(rip) {
            return self.refuse_port().map(|()| None);
        }
        match u64::from(port) {
            PORT_HYPERCALL => self.serve_hypercall(),
            PORT_INVALID_OPCODE => self.emulate(0).map(|()| None),
            PORT_PROTECTION => self.emulate(8).map(|()| None),
            PORT_PANIC => Ok(Some(self.shim_panicked())),
            PORT_VECTOR => {
                let vector = rip.wrapping_sub(self.area.address) / 8;
                Ok(Some(Exit::Crashed(format!(
                    "the guest took vector {vector}, which nothing in it should raise"
                ))))
            }
            _ => Ok(Some(Exit::Crashed(format!(
                "the shim wrote to port {port:#x}"
            )))),
        }
    }

    fn serve_hypercall(&mut self) -> anyhow::Result<Option<Exit>> {
        self.counts.hypercalls += 1;
        let regs = *self.vcpu.regs();
        match self.hypercall(regs.rax, regs.rdi, regs.rsi, regs.rdx)? {
            Ok(value) => {
                self.vcpu.regs_mut().rax = value.cast_unsigned();
                Ok(None)
            }
            Err(exit) => Ok(Some(exit)),
        }
    }

    /// A process used a port that is not its own: the #GP it would have got from the processor.
    pub(super) fn refuse_port(&mut self) -> anyhow::Result<()> {
        self.counts.refused_ports += 1;
        self.vcpu.settle()?;
        self.at_port = false;
        let regs = *self.vcpu.regs();
        let rip = self.port_instruction(regs.rip);
        let frame = [0, rip, CODE_CPL3, regs.rflags, regs.rsp, DATA_CPL3];
        self.memory().write(
            self.area.physical + AREA_EXCEPTION_STACK - 48,
            frame.map(u64::to_le_bytes).as_flattened(),
        )?;
        let at = self.area.address;
        let regs = self.vcpu.regs_mut();
        regs.rip = at + SHIM_VECTORS + 13 * SHIM_VECTOR_SIZE;
        regs.rsp = at + AREA_EXCEPTION_STACK - 48;
        regs.rflags = 0x202;
        Ok(())
    }

    /// Where the port instruction that ends at `after` begins, as far as its bytes tell: an immediate port
    /// (e4 to e7), the port in dx (ec to ef), or a string (6c to 6f).
    fn port_instruction(&self, after: u64) -> u64 {
        let mut bytes = [0; 2];
        let start = after.wrapping_sub(2);
        if guest::read(self.memory(), self.comm(COMM_CR3), start, &mut bytes).is_none() {
            return after;
        }
        match bytes {
            [0x66, 0xec..=0xef | 0x6c..=0x6f] | [0xe4..=0xe7, _] => start,
            [_, 0xec..=0xef | 0x6c..=0x6f] => after.wrapping_sub(1),
            _ => after,
        }
    }

    /// #UD or #GP in the guest's kernel, stopped in the shim with the exception's frame on its stack, `skip` bytes
    /// up: executes the instruction if it is one that the kernel may expect to work. If not, the shim goes on with the exception.
    fn emulate(&mut self, skip: u64) -> anyhow::Result<()> {
        let memory = self.memory().clone();
        let stack = self.vcpu.regs().rsp.wrapping_sub(self.area.address);
        if stack >= AREA_CODE_END - 64 {
            return Ok(());
        }
        let word = |index: u64| {
            memory
                .read_array(self.area.physical + stack + skip + index * 8)
                .map(u64::from_le_bytes)
        };
        let (rip, rflags, rsp) = (word(0)?, word(2)?, word(3)?);
        let cr3 = self.comm(COMM_CR3);
        let mut bytes = [0; 15];
        if guest::read(&memory, cr3, rip, &mut bytes).is_none() {
            // Perhaps the next page is missing, not this one.
            let here = usize::try_from(4096 - rip % 4096).unwrap_or(0).min(15);
            if guest::read(&memory, cr3, rip, &mut bytes[..here]).is_none() {
                return Ok(());
            }
        }
        let info = self.seat().info();
        // CR2 is where the shim put it, after pending, mask and selector.
        let cr2 = memory.read_array(info.0 + 16).map(u64::from_le_bytes)?;
        let user_gs = self.comm(COMM_USER_GS);
        let saved = *self.vcpu.regs();
        let mut context = Context {
            vcpu: &mut self.vcpu,
            xcr0: self.shared.facts.xcr0,
            index: self.index,
            cr4: &mut self.own.cr4,
            cr2,
            cr3,
            user_gs,
        };
        context.vcpu.regs_mut().rsp = rsp;
        let Some(effect) = emulate::execute(&mut context, &bytes, rip) else {
            *self.vcpu.regs_mut() = saved;
            return Ok(());
        };
        self.counts.emulated += 1;
        self.at_port = false;
        self.vcpu.regs_mut().rflags = rflags | 2;
        match effect {
            Effect::None => {}
            Effect::Mask(masked) => info.set_masked(&memory, masked)?,
            Effect::KernelGs(base) => self.set_kernel_gs(base)?,
            Effect::UserGs(base) => self.set_comm(COMM_USER_GS, base)?,
        }
        self.deliver_event()
    }

    fn shim_panicked(&mut self) -> Exit {
        let [vector, rip, cr2, error, rsp] =
            [0, 1, 2, 3, 4].map(|index| self.comm(COMM_PANIC + index * 8));
        Exit::Crashed(format!(
            "the guest kernel took exception {vector} (error {error:#x}, address {cr2:#x}) at {rip:#x} with stack {rsp:#x}, where it cannot be handled"
        ))
    }
}
