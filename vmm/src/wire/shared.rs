//! A ring whose pages lie scattered in guest memory.

use std::sync::Arc;

use thaw_wire::layout::PAGE;
use thaw_wire::ring::Shared;

use super::header::{load, store};
use crate::memory::GuestMemory;

/// Access to one ring. Every address was checked at the handshake, and a VM's memory never
/// shrinks, so an access cannot fail; if it did, it would read as an empty ring's position.
#[derive(Debug)]
pub(super) struct PagedRing {
    memory: Arc<GuestMemory>,
    pages: Vec<u64>,
    mine: u64,
    theirs: u64,
}

impl PagedRing {
    pub(super) fn new(memory: Arc<GuestMemory>, pages: Vec<u64>, mine: u64, theirs: u64) -> Self {
        Self {
            memory,
            pages,
            mine,
            theirs,
        }
    }

    /// Where `offset` lies, and how many bytes there are until its page ends.
    fn locate(&self, offset: usize) -> (u64, usize) {
        let within = offset % PAGE;
        let page = self.pages[(offset / PAGE) % self.pages.len()];
        (page + within as u64, PAGE - within)
    }
}

impl Shared for PagedRing {
    fn capacity(&self) -> u32 {
        (self.pages.len() * PAGE) as u32
    }

    fn peer(&self) -> u32 {
        self.memory.atomic_u32(self.theirs).map_or(0, load)
    }

    fn publish(&mut self, position: u32) {
        if let Ok(word) = self.memory.atomic_u32(self.mine) {
            store(word, position);
        }
    }

    fn read(&self, offset: u32, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let (address, left) = self.locate(offset as usize + done);
            let end = into.len().min(done + left);
            if self.memory.read(address, &mut into[done..end]).is_err() {
                return;
            }
            done = end;
        }
    }

    fn write(&mut self, offset: u32, from: &[u8]) {
        let mut done = 0;
        while done < from.len() {
            let (address, left) = self.locate(offset as usize + done);
            let end = from.len().min(done + left);
            if self.memory.write(address, &from[done..end]).is_err() {
                return;
            }
            done = end;
        }
    }
}
