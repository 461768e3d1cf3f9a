//! One vCPU: running it, and its registers.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO_IN, KVM_EXIT_MMIO, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, kvm_regs, kvm_run, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use nix::poll::ppoll;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::time::TimeSpec;

use super::{KvmError, failed};
use crate::memory::GuestMemory;

/// Why `KVM_RUN` came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest wrote to a port.
    Out {
        /// The port.
        port: u16,
        /// The value, zero-extended; of a string instruction, its first four bytes.
        value: u32,
    },
    /// The guest reads from a port; answer with [`Vcpu::answer_in`].
    In {
        /// The port.
        port: u16,
    },
    /// The guest reads memory that it does not have; answer with [`Vcpu::answer_mmio`].
    MmioRead {
        /// Guest-physical address.
        address: u64,
    },
    /// The guest wrote to memory that it does not have.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// The value: its first four bytes, zero-extended.
        value: u32,
    },
    /// A signal arrived or the immediate-exit flag was set.
    Interrupted,
    /// The guest executed `hlt` at CPL0.
    Halted,
    /// Triple fault.
    TripleFault,
    /// KVM could not go on, in its words.
    Failed(String),
}

/// Makes `KVM_RUN` return, or not start: a pointer to the vCPU's immediate-exit flag.
///
/// [`InterruptHandle::raise`] is one atomic byte store, so a signal handler may call it: keep the
/// pointer ([`InterruptHandle::into_raw`]) in an `AtomicPtr`, and set that to null before the
/// machine is dropped. The flag stays set until [`Vcpu::run`] has reported `Interrupted` once, so
/// a signal that arrives just before `KVM_RUN` is not lost.
#[derive(Clone, Copy, Debug)]
pub struct InterruptHandle(*mut u8);

impl InterruptHandle {
    /// The raw flag. It belongs to the mapping of the vCPU and is gone with it.
    #[must_use]
    pub fn into_raw(self) -> *mut u8 {
        self.0
    }

    /// Sets the flag behind a pointer from [`Self::into_raw`]; does nothing with a null pointer. Async-signal-safe.
    ///
    /// # Safety
    /// The pointer is null or its vCPU is alive.
    pub unsafe fn raise(flag: *mut u8) {
        if !flag.is_null() {
            // SAFETY: the caller vouches that the vCPU's mapping is alive; a byte is always aligned.
            unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
        }
    }
}

/// Value of the immediate-exit flag while [`Vcpu::settle`] uses it; a signal handler stores 1.
const SETTLING: u8 = 2;

fn first_word(data: &[u8]) -> u32 {
    let mut word = [0; 4];
    let used = data.len().min(4);
    word[..used].copy_from_slice(&data[..used]);
    u32::from_le_bytes(word)
}

/// One vCPU. Fields are in the order in which they must be dropped.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    /// The page shared with KVM, mapped as long as `fd` lives.
    shared: NonNull<kvm_run>,
    #[expect(dead_code, reason = "a vCPU that is alive may write to it")]
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointer is to a mapping that `fd` owns and that no thread is tied to.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, memory: Arc<GuestMemory>) -> Self {
        let run = fd.get_kvm_run();
        run.kvm_valid_regs =
            u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS);
        let shared = NonNull::from(run);
        Self { fd, shared, memory }
    }

    fn shared(&self) -> &kvm_run {
        // SAFETY: mapped as long as `self.fd` lives; KVM writes it only inside `run`, which borrows `self` mutably.
        unsafe { self.shared.as_ref() }
    }

    fn shared_mut(&mut self) -> &mut kvm_run {
        // SAFETY: as above, and `self` is borrowed mutably. A signal handler may store to the immediate-exit byte
        // at any time, which is why that byte is only ever accessed as an atomic.
        unsafe { self.shared.as_mut() }
    }

    /// Runs the guest until it needs the host.
    ///
    /// # Errors
    /// `KVM_RUN` fails with anything but EINTR (EAGAIN counts as EINTR).
    pub fn run(&mut self) -> Result<Stop, KvmError> {
        let stop = self.enter()?;
        if stop == Stop::Interrupted {
            self.flag().store(0, Ordering::Relaxed);
        }
        Ok(stop)
    }

    fn enter(&mut self) -> Result<Stop, KvmError> {
        let result = self.fd.run().map(|exit| match exit {
            VcpuExit::IoOut(port, data) => Stop::Out {
                port,
                value: first_word(data),
            },
            VcpuExit::IoIn(port, _) => Stop::In { port },
            VcpuExit::MmioRead(address, _) => Stop::MmioRead { address },
            VcpuExit::MmioWrite(address, data) => Stop::MmioWrite {
                address,
                value: first_word(data),
            },
            // The end of a level-triggered interrupt: of use to a line that stays raised, and none does.
            VcpuExit::IoapicEoi(_) => Stop::Interrupted,
            VcpuExit::Intr => Stop::Interrupted,
            VcpuExit::Hlt => Stop::Halted,
            VcpuExit::Shutdown => Stop::TripleFault,
            other => Stop::Failed(format!("{other:?}")),
        });
        self.shared_mut().kvm_dirty_regs = 0;
        match result {
            Ok(Stop::Failed(text)) => Ok(Stop::Failed(self.describe_failure(text))),
            Ok(stop) => Ok(stop),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                Ok(Stop::Interrupted)
            }
            Err(error) => Err(failed("KVM_RUN")(error)),
        }
    }

    fn describe_failure(&self, text: String) -> String {
        let run = self.shared();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return text;
        }
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so `internal` is the union's live member.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let bytes: Vec<String> = internal.data[1..4]
            .iter()
            .map(|word| format!("{word:016x}"))
            .collect();
        format!(
            "internal error {} of KVM (1: an instruction it cannot emulate) {}",
            internal.suberror,
            bytes.join(" ")
        )
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the flag of this very vCPU, mapped as long as `self`; a signal handler may store to it at any
        // time, and nobody accesses it but as an atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.shared.as_ptr()).immediate_exit) }
    }

    /// Completes whatever the last exit left half done (a port access) and loads changed registers. The
    /// guest executes nothing. A signal that arrives meanwhile still ends the next [`Self::run`].
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn settle(&mut self) -> Result<(), KvmError> {
        let before = self.flag().swap(SETTLING, Ordering::Relaxed);
        let stop = self.enter()?;
        // If a handler stored meanwhile, its value stays.
        self.flag()
            .compare_exchange(SETTLING, before, Ordering::Relaxed, Ordering::Relaxed)
            .ok();
        match stop {
            Stop::Interrupted => Ok(()),
            other => Err(KvmError::Ioctl {
                what: "KVM_RUN with immediate exit",
                source: std::io::Error::other(format!("{other:?}")),
            }),
        }
    }

    /// Whether a signal arrived that [`Self::run`] or [`Self::wait`] have not told of.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.flag().load(Ordering::Relaxed) != 0
    }

    /// Waits where a halted guest would: until a signal, or for so long. Not at all if a signal arrived since
    /// [`Self::run`] or this last told of one.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn wait(&mut self, timeout: Option<Duration>) -> std::io::Result<()> {
        // Blocked from before the look at the flag until the kernel sleeps, so that none comes in between.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let woken = if self.flag().load(Ordering::Relaxed) == 0 {
            ppoll(&mut [], timeout.map(TimeSpec::from), Some(before))
        } else {
            Ok(0)
        };
        before.thread_set_mask()?;
        self.flag().store(0, Ordering::Relaxed);
        match woken {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Fills the answer to a [`Stop::In`] with copies of one byte.
    pub fn answer_in(&mut self, byte: u8) {
        let run = self.shared_mut();
        // SAFETY: called after an IO exit, so `io` is the union's live member.
        let io = unsafe { run.__bindgen_anon_1.io };
        if u32::from(io.direction) != KVM_EXIT_IO_IN {
            return;
        }
        let length = usize::from(io.size) * io.count as usize;
        let base: *mut u8 = (&raw mut *run).cast();
        // SAFETY: KVM places the data of an IO exit inside the vCPU's mapping at this offset.
        unsafe {
            std::ptr::write_bytes(
                base.add(usize::try_from(io.data_offset).unwrap_or(0)),
                byte,
                length,
            )
        };
    }

    /// Answers a [`Stop::MmioRead`] with a value, little-endian, of which the guest gets as many bytes as it asked for.
    pub fn answer_mmio(&mut self, value: u32) {
        let run = self.shared_mut();
        if run.exit_reason == KVM_EXIT_MMIO {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            run.__bindgen_anon_1.mmio.data = data;
        }
    }

    /// The handle that makes [`Self::run`] return.
    pub fn interrupt_handle(&mut self) -> InterruptHandle {
        InterruptHandle(&raw mut self.shared_mut().immediate_exit)
    }

    /// General registers, as of the last stop.
    #[must_use]
    pub fn regs(&self) -> &kvm_regs {
        // SAFETY: the union has one real member besides its padding.
        unsafe { &self.shared().s.regs.regs }
    }

    /// General registers to change; loaded at the next [`Self::run`].
    pub fn regs_mut(&mut self) -> &mut kvm_regs {
        let run = self.shared_mut();
        run.kvm_dirty_regs |= u64::from(KVM_SYNC_X86_REGS);
        // SAFETY: the union has one real member besides its padding.
        unsafe { &mut run.s.regs.regs }
    }

    /// System registers, as of the last stop.
    #[must_use]
    pub fn sregs(&self) -> &kvm_sregs {
        // SAFETY: the union has one real member besides its padding.
        unsafe { &self.shared().s.regs.sregs }
    }

    /// System registers to change; loaded at the next [`Self::run`].
    pub fn sregs_mut(&mut self) -> &mut kvm_sregs {
        let run = self.shared_mut();
        run.kvm_dirty_regs |= u64::from(KVM_SYNC_X86_SREGS);
        // SAFETY: the union has one real member besides its padding.
        unsafe { &mut run.s.regs.sregs }
    }

    /// Exceptions and interrupts in flight, as of the last stop.
    #[must_use]
    pub fn events(&self) -> &kvm_vcpu_events {
        // SAFETY: the union has one real member besides its padding.
        unsafe { &self.shared().s.regs.events }
    }

    /// Loads events at the next [`Self::run`].
    pub fn set_events(&mut self, events: kvm_vcpu_events) {
        let run = self.shared_mut();
        run.kvm_dirty_regs |= u64::from(KVM_SYNC_X86_EVENTS);
        run.s.regs.events = events;
    }

    /// Fills the shared registers from KVM; needed once before the first run.
    ///
    /// # Errors
    /// An ioctl fails.
    pub fn fetch(&mut self) -> Result<(), KvmError> {
        let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let run = self.shared_mut();
        run.s.regs.regs = regs;
        run.s.regs.sregs = sregs;
        Ok(())
    }
}
