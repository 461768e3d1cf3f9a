use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_PAYLOAD, kvm_segment, kvm_vcpu_events,
};

use super::*;
use crate::kvm::apic::{ApicVm, Message};
use crate::kvm::kick::{self, KickTimer};
use crate::kvm::{Host, Stop};
use crate::memory::GuestMemory;

/// Registers of the local APIC's page.
const SPURIOUS: usize = 0xf0;
const IRR: usize = 0x200;
const ICR_HIGH: usize = 0x310;
/// What the timer sends.
const VECTOR: u8 = 0x31;
/// A time stamp that no counter of a test reaches by itself.
const LATE: u64 = 1 << 42;

struct Fixture {
    host: Host,
    vm: ApicVm,
    vcpus: Vec<Vcpu>,
}

/// A VM with two vCPUs that know TSC deadlines and x2APIC.
fn fixture() -> Fixture {
    let host = Host::open().unwrap();
    let memory = Arc::new(GuestMemory::anonymous(2 << 20).unwrap());
    let (vm, vcpus) = host.create_apic_vm(memory, 2).unwrap();
    let mut cpuid = host.supported_cpuid().unwrap();
    for leaf in cpuid.as_mut_slice() {
        if leaf.function == 1 {
            leaf.ecx |= 1 << 21 | 1 << 24;
        }
    }
    vcpus
        .iter()
        .for_each(|vcpu| vcpu.set_cpuid(&cpuid).unwrap());
    Fixture { host, vm, vcpus }
}

impl Fixture {
    fn take(&self, order: &[Part], vcpu: usize) -> VcpuState {
        let msrs = [MSR_TSC, MSR_TSC_DEADLINE];
        VcpuState::take_in(order, &self.vcpus[vcpu], &msrs, self.host.xsave_bytes()).unwrap()
    }

    fn give(&mut self, order: &[Part], state: &VcpuState) {
        let bytes = self.host.xsave_bytes();
        state.give_in(order, &mut self.vcpus[0], bytes).unwrap();
    }

    fn deadline(&self) -> u64 {
        self.vcpus[0].msrs(&[MSR_TSC_DEADLINE]).unwrap()[0].1
    }
}

/// The order with `part` moved to right behind `other`.
fn moved<const N: usize>(order: [Part; N], part: Part, other: Part) -> Vec<Part> {
    let mut order: Vec<Part> = order.into_iter().filter(|each| *each != part).collect();
    let at = order.iter().position(|each| *each == other).unwrap();
    order.insert(at + 1, part);
    order
}

fn set_byte(state: &mut VcpuState, at: usize, value: u8) {
    state.lapic.regs[at] = value.cast_signed();
}

/// A vCPU whose timer is to fire at a time stamp.
fn armed(fixture: &Fixture, now: u64, deadline: u64) -> VcpuState {
    let mut state = fixture.take(&TAKE, 0);
    // The APIC is enabled; its timer is in deadline mode.
    set_byte(&mut state, SPURIOUS, 0xff);
    set_byte(&mut state, SPURIOUS + 1, 1);
    set_byte(&mut state, LVT_TIMER, VECTOR);
    set_byte(&mut state, LVT_TIMER + 2, 4);
    state.msrs = vec![(MSR_TSC, now), (MSR_TSC_DEADLINE, deadline)];
    state
}

#[test]
fn a_deadline_survives_only_after_cpuid_and_the_apic() {
    let mut fixture = fixture();
    let state = armed(&fixture, LATE, LATE * 2);
    fixture.give(&GIVE, &state);
    assert_eq!(fixture.deadline(), LATE * 2);
    for early in [Part::Lapic, Part::Cpuid] {
        let mut fixture = self::fixture();
        if early == Part::Cpuid {
            // As a new vCPU is, before anybody told it what it has.
            let leaf = kvm_cpuid_entry2 {
                function: 1,
                ..Default::default()
            };
            let bare = CpuId::from_entries(&[leaf]).unwrap();
            fixture.vcpus[0].set_cpuid(&bare).unwrap();
        }
        fixture.give(&moved(GIVE, early, Part::Deadline), &state);
        assert_eq!(fixture.deadline(), 0, "{early:?} after the deadline");
    }
}

/// Whether the timer has fired after a fifth of a second in the guest.
fn fires(order: &[Part], in_ms: u64) -> bool {
    let mut fixture = fixture();
    let khz = u64::from(fixture.vcpus[0].tsc_khz().unwrap());
    let mut state = armed(&fixture, LATE, LATE + khz * in_ms);
    state.sregs.cs = kvm_segment {
        limit: 0xffff,
        type_: 11,
        present: 1,
        s: 1,
        ..Default::default()
    };
    state.regs.rip = 0x1000;
    state.regs.rflags = 2;
    // jmp to itself, with interrupts off: what arrives waits in the APIC.
    fixture.vm.memory().write(0x1000, &[0xeb, 0xfe]).unwrap();
    fixture.give(order, &state);
    let vcpu = &mut fixture.vcpus[0];
    vcpu.fetch().unwrap();
    let handle = vcpu.interrupt_handle();
    kick::attach(handle);
    let timer = KickTimer::new().unwrap();
    timer.arm(Duration::from_millis(200).as_nanos() as u64);
    assert_eq!(vcpu.run().unwrap(), Stop::Interrupted);
    kick::detach(handle);
    let state = fixture.take(&TAKE, 0);
    let word = usize::from(VECTOR / 32) * 16;
    state.lapic.regs[IRR + word + usize::from(VECTOR % 32 / 8)] & 1 << (VECTOR % 8) != 0
}

/// Whether this KVM lets a guest's counter be set. A software KVM does not: its guests see the host's.
fn counter_can_be_set() -> bool {
    let fixture = fixture();
    let vcpu = &fixture.vcpus[0];
    vcpu.set_msrs(&[(MSR_TSC, LATE)]).unwrap();
    let now = vcpu.msrs(&[MSR_TSC]).unwrap()[0].1;
    (LATE..LATE + LATE / 8).contains(&now)
}

#[test]
fn a_timer_fires_in_time_only_if_the_counter_came_before_its_deadline() {
    if !counter_can_be_set() {
        eprintln!("not tested: this KVM's guests see the host's time stamp counter");
        return;
    }
    assert!(fires(&GIVE, 20));
    assert!(!fires(&GIVE, 20_000));
    assert!(!fires(&moved(GIVE, Part::Msrs, Part::Deadline), 20));
}

#[test]
fn the_apic_is_kept_only_if_its_mode_was_known_first() {
    let lost = |order: &[Part]| {
        let mut fixture = fixture();
        let mut state = armed(&fixture, LATE, 0);
        // x2APIC, where the high half of the command register is elsewhere in the page.
        state.sregs.apic_base |= 1 << 10 | 1 << 11;
        set_byte(&mut state, ICR_HIGH + 3, 1);
        fixture.give(order, &state);
        let kept = fixture.take(&TAKE, 0);
        assert_eq!(kept.sregs.apic_base, state.sregs.apic_base);
        kept.lapic.regs[ICR_HIGH + 3] == 0
    };
    assert!(!lost(&GIVE));
    // SVM keeps both halves apart in either mode, and has nothing to lose.
    let interpreted = crate::machine::probe().kind == Some(crate::machine::MachineKind::Pv);
    assert!(lost(&moved(GIVE, Part::Sregs, Part::Lapic)) || !interpreted);
}

#[test]
fn a_pending_exception_is_kept_only_after_the_registers() {
    let pending = |order: &[Part]| {
        let mut fixture = fixture();
        let mut state = fixture.take(&TAKE, 0);
        state.events = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_PAYLOAD,
            exception_has_payload: 1,
            exception_payload: 0x1234,
            ..state.events
        };
        state.events.exception.pending = 1;
        state.events.exception.nr = 14;
        state.events.exception.has_error_code = 1;
        fixture.give(order, &state);
        let kept = fixture.take(&TAKE, 0).events;
        (kept.exception.pending == 1).then_some(kept.exception_payload)
    };
    assert_eq!(pending(&GIVE), Some(0x1234));
    assert_eq!(pending(&moved(GIVE, Part::Regs, Part::Events)), None);
}

#[test]
fn a_start_that_waits_is_seen_only_if_asked_for_first() {
    let starts_at = |order: &[Part]| {
        let mut fixture = fixture();
        // KVM finds the second vCPU only once the first has its APIC on.
        let first = armed(&fixture, LATE, 0);
        fixture.give(&GIVE, &first);
        // INIT, then a start at page 0x9a, to the second vCPU.
        for data in [0x500, 0x69a] {
            let message = Message {
                address: 0xfee0_1000,
                data,
            };
            assert_eq!(fixture.vm.send(message).unwrap(), 1);
        }
        let state = fixture.take(order, 1);
        assert_eq!(state.mp_state.mp_state, KVM_MP_STATE_RUNNABLE);
        state.sregs.cs.base
    };
    assert_eq!(starts_at(&TAKE), 0x9_a000);
    assert_ne!(
        starts_at(&moved(TAKE, Part::MpState, Part::Sregs)),
        0x9_a000
    );
}

#[test]
fn a_deadline_that_has_just_passed_is_due_at_once() {
    let fixture = fixture();
    let mut state = armed(&fixture, LATE, 0);
    state.revive_deadline();
    assert_eq!(state.msr(MSR_TSC_DEADLINE), Some(LATE));
    // In another mode of the timer, or masked, there is none to be late for.
    for (at, value) in [(LVT_TIMER + 2, 0), (LVT_TIMER + 2, 5)] {
        let mut state = armed(&fixture, LATE, 0);
        set_byte(&mut state, at, value);
        state.revive_deadline();
        assert_eq!(state.msr(MSR_TSC_DEADLINE), Some(0));
    }
}

#[test]
fn a_register_that_kvm_refuses_is_an_error() {
    let mut fixture = fixture();
    let mut state = fixture.take(&TAKE, 0);
    state.msrs.push((0xdead, 1));
    let bytes = fixture.host.xsave_bytes();
    let error = state.give(&mut fixture.vcpus[0], bytes).unwrap_err();
    assert!(error.to_string().contains("0xdead"), "{error}");
    state.msrs.pop();
    state.xsave.pop();
    let error = state.give(&mut fixture.vcpus[0], bytes).unwrap_err();
    assert!(error.to_string().contains("extended"), "{error}");
}

#[test]
fn the_clock_goes_on_from_where_it_is_set() {
    let fixture = fixture();
    fixture.vm.set_clock(1 << 40).unwrap();
    let now = fixture.vm.clock().unwrap();
    assert!(
        (1 << 40..(1 << 40) + 10_000_000_000).contains(&now),
        "{now}"
    );
}
