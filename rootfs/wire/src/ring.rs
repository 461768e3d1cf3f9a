//! One ring: a byte queue in shared memory whose other end may lie.
//!
//! Each end keeps its own position in private memory and only publishes it; the peer's
//! position is read from shared memory and checked at every use. A position that could not
//! have come about honestly is an error that ends the wire, never an out-of-range access.

use crate::frame::{self, Frame, FrameError, HEADER, Header};

/// Access to one ring's shared memory. Implementations do the unsafe part.
pub trait Shared {
    /// Bytes in the ring: a power of two, the same at every call.
    fn capacity(&self) -> u32;
    /// The peer's published position. Acquire ordering: what the peer wrote before publishing is visible after.
    fn peer(&self) -> u32;
    /// Publishes this end's position. Release ordering.
    fn publish(&mut self, position: u32);
    /// Copies out of the ring. `offset + into.len() <= capacity()` always holds.
    fn read(&self, offset: u32, into: &mut [u8]);
    /// Copies into the ring. `offset + from.len() <= capacity()` always holds.
    fn write(&mut self, offset: u32, from: &[u8]);
}

/// Why a ring can no longer be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The peer's position is impossible.
    #[error("the other end of the ring claims {used} bytes in a ring of {capacity}")]
    Position {
        /// `head - tail` as published.
        used: u32,
        /// The ring's size.
        capacity: u32,
    },
    /// The bytes in the ring are not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// The producing end.
#[derive(Debug)]
pub struct Producer<S> {
    shared: S,
    head: u32,
}

impl<S: Shared> Producer<S> {
    /// A producer over an empty ring; publishes position 0.
    pub fn new(mut shared: S) -> Self {
        shared.publish(0);
        Self { shared, head: 0 }
    }

    /// Bytes that can be put now.
    ///
    /// # Errors
    /// [`RingError::Position`] if the consumer's position is ahead of everything produced.
    pub fn free(&self) -> Result<u32, RingError> {
        let capacity = self.shared.capacity();
        let used = self.head.wrapping_sub(self.shared.peer());
        if used > capacity {
            return Err(RingError::Position { used, capacity });
        }
        Ok(capacity - used)
    }

    /// Puts the whole frame, or nothing when it does not fit now (`Ok(false)`).
    ///
    /// # Errors
    /// As [`Self::free`].
    pub fn put(&mut self, frame: &Frame) -> Result<bool, RingError> {
        let needed = (HEADER + frame.payload.len()) as u32;
        if self.free()? < needed {
            return Ok(false);
        }
        self.copy_in(&frame.header().encode());
        self.copy_in(&frame.payload);
        self.shared.publish(self.head);
        Ok(true)
    }

    fn copy_in(&mut self, bytes: &[u8]) {
        let offset = self.head % self.shared.capacity();
        let until_end = (self.shared.capacity() - offset) as usize;
        let (first, rest) = bytes.split_at(bytes.len().min(until_end));
        self.shared.write(offset, first);
        self.shared.write(0, rest);
        self.head = self.head.wrapping_add(bytes.len() as u32);
    }
}

/// The consuming end.
#[derive(Debug)]
pub struct Consumer<S> {
    shared: S,
    tail: u32,
}

impl<S: Shared> Consumer<S> {
    /// A consumer over an empty ring; publishes position 0.
    pub fn new(mut shared: S) -> Self {
        shared.publish(0);
        Self { shared, tail: 0 }
    }

    fn used(&self) -> Result<u32, RingError> {
        let capacity = self.shared.capacity();
        let used = self.shared.peer().wrapping_sub(self.tail);
        if used > capacity {
            return Err(RingError::Position { used, capacity });
        }
        Ok(used)
    }

    /// Takes the next whole frame, or `None` when there is none yet.
    ///
    /// The header is copied before it is checked, so a peer that rewrites it afterwards
    /// changes nothing.
    ///
    /// # Errors
    /// [`RingError`] when the peer broke the protocol; the ring is dead then.
    pub fn take(&mut self) -> Result<Option<Frame>, RingError> {
        let used = self.used()? as usize;
        if used < HEADER {
            return Ok(None);
        }
        let mut bytes = [0; HEADER];
        self.copy_out(self.tail, &mut bytes);
        let header = Header::decode(bytes)?;
        let whole = HEADER + header.len as usize;
        if used < whole {
            return Ok(None);
        }
        let mut payload = vec![0; header.len as usize];
        self.copy_out(self.tail.wrapping_add(HEADER as u32), &mut payload);
        self.tail = self.tail.wrapping_add(whole as u32);
        self.shared.publish(self.tail);
        Ok(Some(Frame {
            stream: header.stream,
            kind: header.kind,
            payload,
        }))
    }

    fn copy_out(&self, position: u32, into: &mut [u8]) {
        let offset = position % self.shared.capacity();
        let until_end = (self.shared.capacity() - offset) as usize;
        let (first, rest) = into.split_at_mut(into.len().min(until_end));
        self.shared.read(offset, first);
        self.shared.read(0, rest);
    }
}

const _: () =
    assert!(HEADER + frame::MAX_PAYLOAD <= crate::layout::RING_PAGES * crate::layout::PAGE);

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;
    use crate::frame::Kind;

    const CAPACITY: u32 = 128 * 1024;

    #[derive(Clone)]
    struct End {
        bytes: Rc<RefCell<Vec<u8>>>,
        mine: Rc<Cell<u32>>,
        theirs: Rc<Cell<u32>>,
    }

    impl Shared for End {
        fn capacity(&self) -> u32 {
            CAPACITY
        }
        fn peer(&self) -> u32 {
            self.theirs.get()
        }
        fn publish(&mut self, position: u32) {
            self.mine.set(position);
        }
        fn read(&self, offset: u32, into: &mut [u8]) {
            let offset = offset as usize;
            into.copy_from_slice(&self.bytes.borrow()[offset..offset + into.len()]);
        }
        fn write(&mut self, offset: u32, from: &[u8]) {
            let offset = offset as usize;
            self.bytes.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
        }
    }

    fn pair() -> (End, End) {
        let bytes = Rc::new(RefCell::new(vec![0; CAPACITY as usize]));
        let (head, tail) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let producer = End {
            bytes: bytes.clone(),
            mine: head.clone(),
            theirs: tail.clone(),
        };
        (
            producer,
            End {
                bytes,
                mine: tail,
                theirs: head,
            },
        )
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(sizes in prop::collection::vec(0usize..frame::MAX_PAYLOAD, 1..40)) {
            let (producer, consumer) = pair();
            let (mut producer, mut consumer) = (Producer::new(producer), Consumer::new(consumer));
            for (n, size) in sizes.into_iter().enumerate() {
                let sent = Frame::new(n as u32, Kind::Stdout, vec![n as u8; size]);
                prop_assert!(producer.put(&sent).unwrap());
                prop_assert_eq!(consumer.take().unwrap(), Some(sent));
                prop_assert_eq!(consumer.take().unwrap(), None);
            }
        }

        #[test]
        fn a_lying_producer_cannot_make_the_consumer_panic(head: u32, bytes in prop::collection::vec(any::<u8>(), 64)) {
            let (producer, consumer) = pair();
            let mut consumer = Consumer::new(consumer);
            producer.bytes.borrow_mut()[..64].copy_from_slice(&bytes);
            producer.mine.set(head);
            while let Ok(Some(_)) = consumer.take() {}
        }
    }

    #[test]
    fn a_full_ring_takes_nothing_more_until_it_is_drained() {
        let (producer, consumer) = pair();
        let (mut producer, mut consumer) = (Producer::new(producer), Consumer::new(consumer));
        let frame = Frame::new(1, Kind::Data, vec![1; frame::MAX_PAYLOAD]);
        assert!(producer.put(&frame).unwrap());
        assert!(!producer.put(&frame).unwrap());
        assert!(consumer.take().unwrap().is_some());
        assert!(producer.put(&frame).unwrap());
    }

    #[test]
    fn an_impossible_position_is_an_error() {
        let (producer, consumer) = pair();
        producer.mine.set(CAPACITY + 1);
        let mut consumer = Consumer {
            shared: consumer,
            tail: 0,
        };
        assert!(matches!(consumer.take(), Err(RingError::Position { .. })));
    }
}
