//! The wire against a guest end over the same memory, honest and hostile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use thaw_wire::frame::{CONTROL, Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::layout::{self, KICK, PAGE, RING_PAGES, offset};
use thaw_wire::message::{Execute, Exit, Language, Open, Order, Ready, Report};
use thaw_wire::ring::{Consumer, Producer};

use super::shared::PagedRing;
use super::*;

/// Where the guest keeps its header page; the rings' pages follow, in an order that is none.
const HEADER: u64 = 16 * PAGE as u64;
const MEMORY: u64 = 512 * PAGE as u64;

/// The agent's end.
struct Guest {
    memory: Arc<GuestMemory>,
    out: Producer<PagedRing>,
    inn: Consumer<PagedRing>,
}

fn ring_page(ring: u64, index: u64) -> u64 {
    (20 + ring * 100 + (index * 37) % RING_PAGES as u64) * PAGE as u64
}

fn lay(memory: &Arc<GuestMemory>) -> Guest {
    memory.write_u64(HEADER, layout::MAGIC).unwrap();
    write32(memory, offset::VERSION, layout::VERSION);
    write32(memory, offset::RING_PAGES, RING_PAGES as u32);
    for (ring, at) in [(0, offset::TO_HOST_PAGES), (1, offset::TO_GUEST_PAGES)] {
        for index in 0..RING_PAGES as u64 {
            let address = HEADER + at as u64 + index * 8;
            memory.write_u64(address, ring_page(ring, index)).unwrap();
        }
    }
    let ring = |number, mine, theirs| {
        let pages = (0..RING_PAGES as u64)
            .map(|n| ring_page(number, n))
            .collect();
        PagedRing::new(
            memory.clone(),
            pages,
            HEADER + mine as u64,
            HEADER + theirs as u64,
        )
    };
    Guest {
        memory: memory.clone(),
        out: Producer::new(ring(0, offset::TO_HOST_HEAD, offset::TO_HOST_TAIL)),
        inn: Consumer::new(ring(1, offset::TO_GUEST_TAIL, offset::TO_GUEST_HEAD)),
    }
}

fn write32(memory: &GuestMemory, at: usize, value: u32) {
    memory
        .write(HEADER + at as u64, &value.to_le_bytes())
        .unwrap();
}

fn word() -> u32 {
    (HEADER / PAGE as u64) as u32
}

fn ready(generation: u64) -> Report {
    Report::Ready(Ready {
        generation,
        agent: "test".into(),
        kernel: "test".into(),
        languages: vec![Language::Python],
        warm: true,
    })
}

fn report(report: &Report) -> Frame {
    Frame::json(CONTROL, Kind::Report, report).unwrap()
}

/// A wire that is up, and its guest.
fn up() -> (Wire, Guest) {
    let memory = Arc::new(GuestMemory::anonymous(MEMORY).unwrap());
    let mut guest = lay(&memory);
    let mut wire = Wire::new(memory);
    assert!(!wire.rung(word()).unwrap());
    guest.say(&report(&ready(0)));
    assert!(matches!(
        wire.hear(),
        Ok(Some(Heard::Report(Report::Ready(_))))
    ));
    (wire, guest)
}

impl Guest {
    fn say(&mut self, frame: &Frame) {
        assert!(self.out.put(frame).unwrap());
    }
}

fn open(stream: u32, timeout_ms: u64) -> Frame {
    let execute = Execute {
        language: Language::Python,
        code_len: 0,
        code: Some("print(1)".into()),
        timeout_ms,
        env: Default::default(),
        context: None,
        live: false,
    };
    Frame::json(stream, Kind::Open, &Open::Execute(execute)).unwrap()
}

fn faults(wire: &mut Wire) -> bool {
    loop {
        match wire.hear() {
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

#[test]
fn a_command_goes_in_and_its_end_comes_out() {
    let (mut wire, mut guest) = up();
    let opening = open(1, 1000);
    assert!(wire.admit(&opening, Instant::now()).unwrap());
    assert!(wire.put(&opening).unwrap());
    assert_eq!(guest.inn.take().unwrap().unwrap(), opening);
    guest.say(&Frame::new(1, Kind::Stdout, b"1\n".to_vec()));
    guest.say(&Frame::json(1, Kind::Exit, &Exit::default()).unwrap());
    let Ok(Some(Heard::Relay(output))) = wire.hear() else {
        panic!("no output");
    };
    assert_eq!(output.payload, b"1\n");
    assert!(matches!(wire.hear(), Ok(Some(Heard::Relay(_)))));
    assert_eq!(wire.open_streams(), 0);
    // A signal that crosses the end is late, no fault.
    assert!(
        !wire
            .admit(&Frame::new(1, Kind::Signal, Vec::new()), Instant::now())
            .unwrap()
    );
    // But the guest may not go on.
    guest.say(&Frame::new(1, Kind::Stdout, b"more".to_vec()));
    assert!(faults(&mut wire));
}

#[test]
fn frames_of_every_size_cross_scattered_pages() {
    let (mut wire, mut guest) = up();
    for round in 0..200_usize {
        let size = (round * 7919) % MAX_PAYLOAD;
        let sent = Frame::new(
            1,
            Kind::Stdin,
            (0..size).map(|n| (n + round) as u8).collect(),
        );
        assert!(wire.put(&sent).unwrap());
        assert_eq!(guest.inn.take().unwrap().unwrap(), sent);
    }
}

#[test]
fn a_restored_guest_is_heard_only_under_its_new_generation() {
    let (wire, mut guest) = up();
    let memory = guest.memory.clone();
    guest.say(&Frame::new(9, Kind::Stdout, b"of the past".to_vec()));
    let mut wire = Wire::restored(memory.clone(), 7, wire.header().unwrap()).unwrap();
    assert!(wire.hear().unwrap().is_none(), "not before the handshake");
    assert!(!wire.put(&open(1, 1)).unwrap());
    let generation = memory.read_u64(HEADER + offset::GENERATION as u64).unwrap();
    assert_eq!(generation, 7);
    let mut guest = lay(&memory);
    wire.rung(word()).unwrap();
    guest.say(&report(&ready(7)));
    assert!(matches!(wire.hear(), Ok(Some(Heard::Report(_)))));
}

#[test]
fn a_handshake_under_an_old_generation_is_asked_for_again() {
    let memory = Arc::new(GuestMemory::anonymous(MEMORY).unwrap());
    let _guest = lay(&memory);
    let mut wire = Wire::restored(memory.clone(), 7, 300 * PAGE as u64).unwrap();
    assert!(wire.rung(word()).unwrap(), "the agent must be called");
    assert!(!wire.is_attached());
    assert!(!wire.rung(word()).unwrap());
    assert!(wire.is_attached());
}

#[test]
fn a_bad_header_is_a_fault() {
    type Spoil = fn(&GuestMemory);
    let spoils: [Spoil; 6] = [
        |memory| memory.write_u64(HEADER, 1).unwrap(),
        |memory| write32(memory, offset::VERSION, layout::VERSION + 1),
        |memory| write32(memory, offset::RING_PAGES, 3),
        |memory| write32(memory, offset::RING_PAGES, 1 << 20),
        |memory| {
            memory
                .write_u64(HEADER + offset::TO_HOST_PAGES as u64, MEMORY)
                .unwrap()
        },
        |memory| {
            memory
                .write_u64(HEADER + offset::TO_GUEST_PAGES as u64 + 8, u64::MAX)
                .unwrap()
        },
    ];
    for (n, spoil) in spoils.into_iter().enumerate() {
        let memory = Arc::new(GuestMemory::anonymous(MEMORY).unwrap());
        let _guest = lay(&memory);
        spoil(&memory);
        let mut wire = Wire::new(memory);
        assert!(
            matches!(wire.rung(word()), Err(GuestFault::Handshake(_))),
            "{n}"
        );
    }
    let mut wire = Wire::new(Arc::new(GuestMemory::anonymous(MEMORY).unwrap()));
    for page in [1, 511, 512, u32::MAX] {
        assert!(wire.rung(page).is_err(), "{page:#x}");
    }
}

#[test]
fn every_breach_is_a_fault() {
    let said: [(&str, Frame); 8] = [
        ("an unknown stream", Frame::new(5, Kind::Stdout, vec![1])),
        ("a host's frame", Frame::new(1, Kind::Open, Vec::new())),
        ("an order", Frame::new(CONTROL, Kind::Order, b"{}".to_vec())),
        (
            "no report",
            Frame::new(CONTROL, Kind::Report, b"{".to_vec()),
        ),
        ("an unasked report", report(&Report::Quiet)),
        ("a second ready", report(&ready(0))),
        ("a bad grant", Frame::new(1, Kind::Credit, vec![1])),
        ("a signal", Frame::new(1, Kind::Signal, Vec::new())),
    ];
    for (what, frame) in said {
        let (mut wire, mut guest) = up();
        wire.admit(&open(1, 1000), Instant::now()).unwrap();
        guest.say(&frame);
        assert!(faults(&mut wire), "{what}");
    }
}

#[test]
fn output_beyond_its_credit_is_a_fault() {
    let (mut wire, mut guest) = up();
    wire.admit(&open(1, 1000), Instant::now()).unwrap();
    let full = Frame::new(1, Kind::Stdout, vec![0; MAX_PAYLOAD]);
    for _ in 0..INITIAL_CREDIT as usize / MAX_PAYLOAD {
        guest.say(&full);
        assert!(!faults(&mut wire));
    }
    wire.admit(&Frame::credit(1, 1), Instant::now()).unwrap();
    guest.say(&Frame::new(1, Kind::Stderr, vec![0]));
    assert!(!faults(&mut wire));
    guest.say(&Frame::new(1, Kind::Stderr, vec![0]));
    assert!(faults(&mut wire));
}

#[test]
fn ringing_for_nothing_ends() {
    let (mut wire, _) = up();
    for _ in 0..MAX_EMPTY_RINGS {
        wire.rung(KICK).unwrap();
    }
    assert!(matches!(wire.rung(KICK), Err(GuestFault::Doorbell)));
    let (mut wire, _) = up();
    let again = (0..100).find(|_| wire.rung(word()).is_err());
    assert!(again.is_some_and(|n| n <= MAX_HANDSHAKES));
}

#[test]
fn an_order_is_answered_once() {
    let (mut wire, mut guest) = up();
    wire.expect_answer();
    wire.put(&Frame::json(CONTROL, Kind::Order, &Order::Quiesce).unwrap())
        .unwrap();
    guest.say(&report(&Report::Quiet));
    assert!(!faults(&mut wire));
    guest.say(&report(&Report::Quiet));
    assert!(faults(&mut wire));
}

#[test]
fn a_command_that_overruns_is_killed_and_then_given_up() {
    let (mut wire, _guest) = up();
    let start = Instant::now();
    wire.admit(&open(1, 1000), start).unwrap();
    assert_eq!(wire.overdue(start + Duration::from_secs(2)), None);
    let late = wire.next_deadline().unwrap();
    assert_eq!(wire.overdue(late), Some(Overdue::Kill(1)));
    assert_eq!(wire.overdue(late), None);
    let later = wire.next_deadline().unwrap();
    assert_eq!(wire.overdue(later), Some(Overdue::Unresponsive(1)));
}

#[test]
fn the_table_of_streams_is_bounded() {
    let (mut wire, _guest) = up();
    for stream in 1..=MAX_STREAMS as u32 {
        wire.admit(&open(stream, 1000), Instant::now()).unwrap();
    }
    assert!(wire.admit(&open(999, 1000), Instant::now()).is_err());
    assert!(wire.admit(&open(1, 1000), Instant::now()).is_err());
}

proptest! {
    #[test]
    fn any_header_page_and_any_positions_are_survived(
        page in prop::collection::vec(any::<u8>(), PAGE),
        head: u32, tail: u32, honest: bool,
    ) {
        let memory = Arc::new(GuestMemory::anonymous(MEMORY).unwrap());
        if honest {
            lay(&memory);
        } else {
            memory.write(HEADER, &page).unwrap();
            memory.write_u64(HEADER, layout::MAGIC).unwrap();
            write32(&memory, offset::VERSION, layout::VERSION);
        }
        let mut wire = Wire::new(memory.clone());
        if wire.rung(word()).is_ok() {
            memory.write(20 * PAGE as u64, &page).unwrap();
            write32(&memory, offset::TO_HOST_HEAD, head);
            write32(&memory, offset::TO_GUEST_TAIL, tail);
            faults(&mut wire);
            // Whatever the guest claims, putting ends with a verdict.
            let verdict = wire.put(&open(1, 1));
            prop_assert!(verdict.is_ok() || matches!(verdict, Err(GuestFault::Ring(_))));
        }
    }
}
