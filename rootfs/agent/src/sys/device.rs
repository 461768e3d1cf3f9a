//! Device and kernel calls: ports, event channels, loop devices, modules, the random pool.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use thaw_wire::layout::DOORBELL_PORT;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Permits this process, and no child, the doorbell port.
///
/// # Errors
/// Not root, or the machine refuses.
pub fn allow_doorbell(allowed: bool) -> io::Result<()> {
    // SAFETY: changes this thread's port permissions only.
    let result = unsafe { libc::ioperm(DOORBELL_PORT.into(), 4, allowed.into()) };
    check(result.into()).map(drop)
}

/// Rings the host's doorbell with a word. [`allow_doorbell`] must have succeeded, else the process
/// gets SIGSEGV.
pub fn ring_doorbell(word: u32) {
    // SAFETY: an `out` touches no memory of ours that the compiler knows of; without `nomem` it is a
    // compiler barrier, so what was written to the ring before is visible to the host.
    unsafe {
        std::arch::asm!("out dx, eax", in("dx") DOORBELL_PORT, in("eax") word, options(nostack, preserves_flags));
    }
}

/// Puts this thread ahead of every ordinary one; children are ordinary again.
///
/// # Errors
/// Not root, or the kernel's refusal.
pub fn run_first() -> io::Result<()> {
    // SAFETY: all-zero is a valid sched_param.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = 1;
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the kernel reads one sched_param, which outlives the call.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    check(result.into()).map(drop)
}

/// Binds a Xen virtual interrupt to an open `/dev/xen/evtchn`; the port it got.
///
/// # Errors
/// The kernel's refusal.
pub fn bind_virq(evtchn: BorrowedFd<'_>, virq: u32) -> io::Result<u32> {
    // _IOC(_IOC_NONE, 'E', 0, 4) of the kernel's xen/evtchn.h.
    const IOCTL_EVTCHN_BIND_VIRQ: libc::c_ulong = 0x0004_4500;
    let argument: u32 = virq;
    // SAFETY: the ioctl reads one u32 from the pointer, which outlives the call.
    let port = unsafe {
        libc::ioctl(
            evtchn.as_raw_fd(),
            IOCTL_EVTCHN_BIND_VIRQ,
            &raw const argument,
        )
    };
    check(port.into()).map(|port| port as u32)
}

/// Bytes waiting in a pipe.
///
/// # Errors
/// Not a pipe.
pub fn waiting_bytes(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    check(result.into()).map(|_| usize::try_from(count).unwrap_or(0))
}

/// Gives a terminal another size.
///
/// # Errors
/// It is no terminal.
pub fn set_window_size(terminal: BorrowedFd<'_>, size: &nix::pty::Winsize) -> io::Result<()> {
    // SAFETY: TIOCSWINSZ reads one winsize from the pointer, which outlives the call.
    let result = unsafe {
        libc::ioctl(
            terminal.as_raw_fd(),
            libc::TIOCSWINSZ,
            std::ptr::from_ref(size),
        )
    };
    check(result.into()).map(drop)
}

/// Claims an open parallel port, whose interrupts are counted from then on.
///
/// # Errors
/// The kernel's refusal.
pub fn claim_parallel_port(port: BorrowedFd<'_>) -> io::Result<()> {
    // _IO('p', 0x8b) of the kernel's linux/ppdev.h.
    const PPCLAIM: libc::c_ulong = 0x708b;
    // SAFETY: the ioctl takes no argument.
    let result = unsafe { libc::ioctl(port.as_raw_fd(), PPCLAIM) };
    check(result.into()).map(drop)
}

/// Takes the count of a parallel port's interrupts, which starts again at zero.
///
/// # Errors
/// The port is not claimed.
pub fn take_parallel_interrupts(port: BorrowedFd<'_>) -> io::Result<u32> {
    // _IOR('p', 0x93, int) of the kernel's linux/ppdev.h.
    const PPCLRIRQ: libc::c_ulong = 0x8004_7093;
    let mut count: libc::c_int = 0;
    // SAFETY: the ioctl writes one int to the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(port.as_raw_fd(), PPCLRIRQ, &raw mut count) };
    check(result.into()).map(|_| u32::try_from(count).unwrap_or(0))
}

/// Loads a kernel module, with parameters as `modprobe` takes them.
///
/// # Errors
/// The kernel's refusal; `EEXIST` when it is loaded already.
pub fn load_module(module: &File, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    // SAFETY: the kernel reads the file and the string; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            module.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    check(result).map(drop)
}

/// `struct loop_info64` of the kernel's linux/loop.h.
#[repr(C)]
#[derive(Debug)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of the kernel's linux/loop.h.
#[repr(C)]
#[derive(Debug)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

/// The number of a loop device that is free.
///
/// # Errors
/// The kernel's refusal.
pub fn free_loop(control: &File) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
    // SAFETY: the ioctl takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    check(number.into()).map(|number| number as u32)
}

/// Puts a file behind a loop device, read-only.
///
/// # Errors
/// The kernel's refusal.
pub fn configure_loop(device: &File, backing: &File) -> io::Result<()> {
    const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
    const LO_FLAGS_READ_ONLY: u32 = 1;
    let config = LoopConfig {
        fd: backing.as_raw_fd() as u32,
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_READ_ONLY,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the ioctl reads one loop_config (size asserted above), which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    check(result.into()).map(drop)
}

/// Brings a network interface up.
///
/// # Errors
/// No such interface, or the kernel's refusal.
pub fn interface_up(name: &str) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) };
    check(result.into()).map(drop)
}

/// Mixes `seed` into the kernel's random pool, credits it fully, and makes the generator take a
/// new key from the pool at once.
///
/// # Errors
/// The kernel's refusal; the generator must not be used then.
pub fn reseed_kernel(random: &File, seed: &[u8; 32]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; 32],
    }
    let info = PoolInfo {
        entropy_count: 256,
        buf_size: 32,
        buf: *seed,
    };
    // SAFETY: the ioctl reads the two counts and `buf_size` bytes, all inside `info`.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    check(result.into())?;
    // SAFETY: the ioctl takes no argument.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    check(result.into()).map(drop)
}
