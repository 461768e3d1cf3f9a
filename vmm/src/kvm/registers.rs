//! What else KVM keeps about a vCPU, beside the registers on the page shared with it: one ioctl each.

use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, Msrs, kvm_debugregs, kvm_msr_entry, kvm_xcrs, kvm_xsave,
};

use super::{KvmError, Vcpu, failed};

impl Vcpu {
    /// What CPUID shows to the guest where KVM executes it.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        self.fd.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))
    }

    /// Frequency of the guest's time stamp counter, kHz.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))
    }

    /// Writes model-specific registers; a register that KVM refuses is an error.
    ///
    /// # Errors
    /// The ioctl fails or stops short.
    pub fn set_msrs(&self, registers: &[(u32, u64)]) -> Result<(), KvmError> {
        let entries: Vec<kvm_msr_entry> = registers
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs =
            Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks("room for that many MSRs"))?;
        let done = self.fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        if done == entries.len() {
            Ok(())
        } else {
            let refused = entries.get(done).map_or(0, |entry| entry.index);
            Err(KvmError::Ioctl {
                what: "KVM_SET_MSRS",
                source: std::io::Error::other(format!("register {refused:#x} was refused")),
            })
        }
    }

    /// Reads model-specific registers, up to the first that KVM refuses to read.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        let entries: Vec<kvm_msr_entry> = indices
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks("room for that many MSRs"))?;
        let read = self
            .fd
            .get_msrs(&mut msrs)
            .map_err(failed("KVM_GET_MSRS"))?;
        Ok(msrs
            .as_slice()
            .iter()
            .take(read)
            .map(|entry| (entry.index, entry.data))
            .collect())
    }

    /// Makes the guest's time stamp counter run at another rate than the host's.
    ///
    /// # Errors
    /// The ioctl fails: the processor cannot.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        self.fd.set_tsc_khz(khz).map_err(failed("KVM_SET_TSC_KHZ"))
    }

    /// Tells the guest's kernel that it stood still, so that its watchdogs do not take that for a hang. Of no effect
    /// on a guest that does not use KVM's clock.
    ///
    /// # Errors
    /// The ioctl fails for another reason than that.
    pub fn announce_pause(&self) -> Result<(), KvmError> {
        match self.fd.kvmclock_ctrl() {
            Err(error) if error.errno() != libc::EINVAL => Err(failed("KVM_KVMCLOCK_CTRL")(error)),
            _ => Ok(()),
        }
    }

    /// Whether the vCPU has halted with interrupts off: nothing will ever wake it.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn is_dead(&self) -> Result<bool, KvmError> {
        const INTERRUPTS: u64 = 1 << 9;
        if self.regs().rflags & INTERRUPTS != 0 {
            return Ok(false);
        }
        let state = self.fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        Ok(state.mp_state == KVM_MP_STATE_HALTED)
    }

    /// Extended state (x87, SSE, AVX...).
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn xsave(&self) -> Result<kvm_xsave, KvmError> {
        self.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))
    }

    /// Loads extended state.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn set_xsave(&self, state: &kvm_xsave) -> Result<(), KvmError> {
        // SAFETY: features whose state exceeds `kvm_xsave` (AMX) are enabled by a request to the kernel that thaw never makes.
        unsafe { self.fd.set_xsave(state) }.map_err(failed("KVM_SET_XSAVE"))
    }

    /// Extended control registers.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn xcrs(&self) -> Result<kvm_xcrs, KvmError> {
        self.fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))
    }

    /// Loads XCR0.
    ///
    /// # Errors
    /// The host lacks a feature in it.
    pub fn set_xcr0(&self, value: u64) -> Result<(), KvmError> {
        let mut registers = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        registers.xcrs[0].value = value;
        self.fd.set_xcrs(&registers).map_err(failed("KVM_SET_XCRS"))
    }

    /// Debug registers.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn debug_regs(&self) -> Result<kvm_debugregs, KvmError> {
        self.fd
            .get_debug_regs()
            .map_err(failed("KVM_GET_DEBUGREGS"))
    }

    /// Loads debug registers.
    ///
    /// # Errors
    /// The ioctl fails.
    pub fn set_debug_regs(&self, registers: &kvm_debugregs) -> Result<(), KvmError> {
        self.fd
            .set_debug_regs(registers)
            .map_err(failed("KVM_SET_DEBUGREGS"))
    }
}
