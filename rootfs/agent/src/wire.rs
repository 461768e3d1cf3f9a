//! The real link: rings in pinned pages and a pair of doorbells.

use std::io;
use std::os::fd::BorrowedFd;

use thaw_wire::frame::{Frame, HEADER};
use thaw_wire::layout::{self, KICK, PAGE, RING_PAGES, offset};
use thaw_wire::ring::{Consumer, Producer};

use crate::doorbell::Bells;
use crate::link::{Link, LinkError};
use crate::sys::pages::{Pages, RingEnd};

/// Taking this many bytes off a ring may have made room for a host that waits for it.
const ROOM_WORTH_A_KICK: usize = RING_PAGES * PAGE / 2;

/// Rings and bells.
#[derive(Debug)]
pub struct Wire {
    bells: Bells,
    pages: &'static Pages,
    header: u32,
    outgoing: Producer<RingEnd>,
    incoming: Consumer<RingEnd>,
    generation: u64,
    sent: bool,
    taken: usize,
}

impl Wire {
    /// Allocates the pages and describes them in the header; no handshake yet.
    ///
    /// # Errors
    /// No pinned memory, or its frame numbers are hidden.
    pub fn lay(bells: Bells) -> io::Result<Self> {
        // Lives as long as the guest, so it is leaked on purpose.
        let pages: &'static Pages = Box::leak(Box::new(Pages::map(1 + 2 * RING_PAGES)?));
        let frames = pages.frames()?;
        pages.store64(offset::MAGIC, layout::MAGIC);
        pages.store32(offset::VERSION, layout::VERSION);
        pages.store32(offset::RING_PAGES, RING_PAGES as u32);
        for ring in [0, 1] {
            let at = [offset::TO_HOST_PAGES, offset::TO_GUEST_PAGES][ring];
            for page in 0..RING_PAGES {
                let frame = frames[1 + ring * RING_PAGES + page];
                pages.store64(at + page * 8, frame * PAGE as u64);
            }
        }
        let header = u32::try_from(frames[0])
            .map_err(|_| io::Error::other("the header page lies too high"))?;
        let (outgoing, incoming) = ends(pages);
        Ok(Self {
            bells,
            pages,
            header,
            outgoing,
            incoming,
            generation: 0,
            sent: false,
            taken: 0,
        })
    }

    fn check_generation(&self) -> Result<(), LinkError> {
        if self.pages.load64(offset::GENERATION) != self.generation {
            return Err(LinkError::NewGeneration);
        }
        Ok(())
    }
}

/// Fresh ends of both rings; publishes position 0 of ours.
fn ends(pages: &'static Pages) -> (Producer<RingEnd>, Consumer<RingEnd>) {
    let outgoing = pages.ring(1, RING_PAGES, offset::TO_HOST_HEAD, offset::TO_HOST_TAIL);
    let incoming = pages.ring(
        1 + RING_PAGES,
        RING_PAGES,
        offset::TO_GUEST_TAIL,
        offset::TO_GUEST_HEAD,
    );
    (Producer::new(outgoing), Consumer::new(incoming))
}

impl Link for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.bells.fd()
    }

    fn shake_hands(&mut self) -> Result<(), LinkError> {
        // A snapshot may be taken and restored anywhere in here: the generation read before the
        // doorbell must still hold after it.
        loop {
            self.generation = self.pages.load64(offset::GENERATION);
            // The host's positions are of another generation until it attaches; it sets them then.
            self.pages.store32(offset::TO_HOST_TAIL, 0);
            self.pages.store32(offset::TO_GUEST_HEAD, 0);
            (self.outgoing, self.incoming) = ends(self.pages);
            (self.sent, self.taken) = (false, 0);
            self.bells.ring(self.header);
            if self.check_generation().is_ok() {
                return Ok(());
            }
        }
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn acknowledge(&mut self) -> Result<(), LinkError> {
        Ok(self.bells.acknowledge()?)
    }

    fn receive(&mut self) -> Result<Option<Frame>, LinkError> {
        self.check_generation()?;
        let frame = self.incoming.take()?;
        self.taken += frame
            .as_ref()
            .map_or(0, |frame| HEADER + frame.payload.len());
        Ok(frame)
    }

    fn send(&mut self, frame: &Frame) -> Result<bool, LinkError> {
        self.check_generation()?;
        let put = self.outgoing.put(frame)?;
        self.sent |= put;
        Ok(put)
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        if self.sent || self.taken >= ROOM_WORTH_A_KICK {
            self.bells.ring(KICK);
            (self.sent, self.taken) = (false, 0);
        }
        Ok(())
    }
}
