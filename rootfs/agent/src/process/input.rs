//! A process's input: what the host sent and the process has not taken yet.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use thaw_wire::frame::INITIAL_CREDIT;

/// The host sent more than it was granted.
#[derive(Debug, PartialEq, Eq)]
pub struct Overrun;

/// Input on its way. Holds at most [`INITIAL_CREDIT`] bytes.
#[derive(Debug)]
pub struct Input {
    /// Nothing once it is closed.
    fd: Option<OwnedFd>,
    /// Nobody takes any more of it.
    is_over: bool,
    is_terminal: bool,
    queue: VecDeque<u8>,
    /// Bytes that the host may send.
    window: u32,
    /// Bytes taken and not granted again.
    owed: u32,
    /// Bytes at the front of the queue that an earlier host sent: nobody waits for credit for them.
    inherited: usize,
    has_ended: bool,
}

impl Input {
    /// Input that goes to a pipe's or a terminal's non-blocking descriptor.
    pub fn new(fd: OwnedFd, is_terminal: bool) -> Self {
        Self {
            fd: Some(fd),
            is_over: false,
            is_terminal,
            queue: VecDeque::new(),
            window: INITIAL_CREDIT,
            owed: 0,
            inherited: 0,
            has_ended: false,
        }
    }

    /// To poll for writing; nothing when nothing waits to be written.
    pub fn waiting(&self) -> Option<BorrowedFd<'_>> {
        self.fd().filter(|_| !self.queue.is_empty())
    }

    /// Its descriptor, while it has one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Takes a piece from the host; an empty one is the end, and what comes after it goes nowhere.
    ///
    /// # Errors
    /// There was no credit for it.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), Overrun> {
        let len = u32::try_from(bytes.len()).map_err(|_| Overrun)?;
        self.window = self.window.checked_sub(len).ok_or(Overrun)?;
        if bytes.is_empty() {
            self.has_ended = true;
            self.close_at_end();
        } else if self.has_ended || self.is_over {
            // Nobody reads it any more; the host must not wait for that.
            self.owed += len;
        } else if self.queue.is_empty() {
            let written = self.write(bytes);
            self.queue.extend(&bytes[written..]);
            if self.is_over {
                self.give_up();
            }
        } else {
            self.queue.extend(bytes);
        }
        Ok(())
    }

    /// Writes as much of what waits as the process takes now.
    pub fn write_on(&mut self) {
        while !self.queue.is_empty() {
            let queue = std::mem::take(&mut self.queue);
            let written = self.write(queue.as_slices().0);
            self.queue = queue;
            self.queue.drain(..written);
            if self.is_over {
                self.give_up();
            } else if written == 0 {
                return;
            }
        }
        self.close_at_end();
    }

    /// How much the process took; it may turn out to be gone, or to have closed its input.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while let Some(fd) = self
            .fd
            .as_ref()
            .filter(|_| !self.is_over && written < bytes.len())
        {
            match nix::unistd::write(fd, &bytes[written..]) {
                Ok(count) => written += count,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => break,
                Err(_) => self.is_over = true,
            }
        }
        let inherited = written.min(self.inherited);
        self.inherited -= inherited;
        self.owed += (written - inherited) as u32;
        written
    }

    /// A terminal stays open: it has no end of input, its owner types one.
    fn close_at_end(&mut self) {
        if self.has_ended && self.queue.is_empty() && !self.is_terminal {
            self.close();
        }
    }

    /// Gives up what waits, and takes no more. A terminal's descriptor stays: the terminal is still open
    /// by its other one, and a poll forgets a descriptor by itself only when nothing is open any more.
    pub fn give_up(&mut self) {
        self.is_over = true;
        self.owed += (self.queue.len() - self.inherited) as u32;
        self.inherited = 0;
        self.queue = VecDeque::new();
        if !self.is_terminal {
            self.fd = None;
        }
    }

    /// Gives up, and closes the descriptor.
    pub fn close(&mut self) {
        self.give_up();
        self.fd = None;
    }

    /// Another host sends from now on, and has the first window to do so. What waits is from the one before; it holds
    /// twice [`INITIAL_CREDIT`] at most then, for a host that never waits for its terminals to read loses what it typed before.
    pub fn attached(&mut self) {
        self.queue.truncate(INITIAL_CREDIT as usize);
        self.inherited = self.queue.len();
        (self.window, self.owed) = (INITIAL_CREDIT, 0);
    }

    /// What may be granted again, once it is worth a frame or nothing waits.
    pub fn grant(&mut self) -> Option<u32> {
        let is_worth_it = self.owed >= INITIAL_CREDIT / 4 || self.queue.is_empty();
        let grant = (self.owed > 0 && is_worth_it).then(|| std::mem::take(&mut self.owed))?;
        self.window += grant;
        Some(grant)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::fcntl::OFlag;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::pipe2;
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (std::fs::File, Input) {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (read.into(), Input::new(write, false))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_taken_arrives_in_order_and_is_granted_once(
            pieces in prop::collection::vec((1usize..40_000, 0usize..60_000), 1..40)
        ) {
            let (mut read, mut input) = pair();
            let (mut sent, mut seen, mut credit) = (0u32, Vec::<u8>::new(), INITIAL_CREDIT);
            for (len, wanted) in pieces {
                let len = len.min(credit as usize);
                if len > 0 {
                    let piece: Vec<u8> = (sent..sent + len as u32).map(|n| (n >> 3) as u8).collect();
                    prop_assert_eq!(input.take(&piece), Ok(()));
                    (sent, credit) = (sent + len as u32, credit - len as u32);
                }
                let mut into = vec![0; wanted];
                let count = read.read(&mut into).unwrap_or(0);
                seen.extend(&into[..count]);
                input.write_on();
                credit += input.grant().unwrap_or(0);
                prop_assert!(credit <= INITIAL_CREDIT);
            }
            prop_assert_eq!(input.take(&[]), Ok(()));
            // With the queue empty the end is the pipe's end, too.
            let mut into = vec![0; 1 << 20];
            loop {
                // A process that another test is starting holds a copy of the pipe's other end until it
                // is another program, so the end may be a moment late.
                let mut is_there = [PollFd::new(read.as_fd(), PollFlags::POLLIN)];
                prop_assert_eq!(poll(&mut is_there, PollTimeout::from(10_000u16)), Ok(1));
                let count = read.read(&mut into).unwrap();
                if count == 0 {
                    break;
                }
                seen.extend(&into[..count]);
                input.write_on();
            }
            prop_assert!(seen.iter().enumerate().all(|(n, byte)| *byte == (n >> 3) as u8));
            prop_assert_eq!(seen.len() as u32, sent);
        }
    }

    #[test]
    fn more_than_was_granted_is_an_overrun() {
        let (_read, mut input) = pair();
        let window = vec![1; INITIAL_CREDIT as usize];
        assert_eq!(input.take(&window), Ok(()));
        // A pipe holds half of it; that much is granted again and not a byte more.
        let granted = input.grant().unwrap();
        assert_eq!(input.take(&vec![1; granted as usize]), Ok(()));
        assert_eq!(input.take(&[1]), Err(Overrun));
    }

    #[test]
    fn nobody_who_reads_is_no_reason_to_wait() {
        let (read, mut input) = pair();
        let window = vec![1; INITIAL_CREDIT as usize];
        assert_eq!(input.take(&window), Ok(()));
        drop(read);
        input.write_on();
        assert_eq!(input.grant(), Some(INITIAL_CREDIT));
        assert_eq!(input.take(&window), Ok(()));
        assert_eq!(input.grant(), Some(INITIAL_CREDIT));
    }

    #[test]
    fn after_the_end_nothing_arrives() {
        let (_read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let mut terminal = Input::new(write, true);
        assert_eq!(terminal.take(&[]), Ok(()));
        assert_eq!(terminal.take(b"late"), Ok(()));
        assert!(terminal.fd().is_some() && terminal.waiting().is_none());
        assert_eq!(terminal.grant(), Some(4));
    }
}
