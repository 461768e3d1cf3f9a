//! Everything that is not a processor or memory: a UART for the console, the bell, the I/O APIC, and the two ports by which
//! a guest calls the host.

use std::io::Write;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use thaw_wire::layout::{BELL_LINE, DOORBELL_PORT};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bell::{self, Bell};
use super::ioapic::IoApic;
use crate::kvm::apic::{ApicVm, Message};
use crate::machine::console::Console;

/// The first serial port, and its interrupt line.
const UART: u16 = 0x3f8;
const UART_LAST: u16 = UART + 7;
const UART_LINE: u32 = 4;
/// Commands of the keyboard controller, of which one remains: the reset line.
const KEYBOARD: u16 = 0x64;
const RESET: u32 = 0xfe;

/// What a write to a device asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Nothing.
    Nothing,
    /// The agent rang with this word.
    Doorbell(u32),
    /// The guest pulled the reset line.
    Reset,
    /// The routes of interrupts changed: [`Devices::route`].
    Route,
    /// Something was printed.
    Printed,
}

/// An interrupt line.
#[derive(Debug)]
struct Line(EventFd);

impl Line {
    fn new() -> std::io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }
}

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// Where the UART's output goes.
#[derive(Debug, Default)]
struct Printer(Console);

impl Write for Printer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The devices of one VM.
#[derive(Debug)]
pub(super) struct Devices {
    uart: Serial<Line, NoEvents, Printer>,
    bell: Bell,
    bell_line: Line,
    io_apic: IoApic,
}

/// The UART's registers. What waits to be read is not kept: nothing is ever sent to a guest that way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Uart {
    divisor: [u8; 2],
    interrupts: [u8; 2],
    line: [u8; 2],
    modem: [u8; 2],
    scratch: u8,
}

/// Devices as they are saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedDevices {
    uart: Uart,
    bell: Bell,
    io_apic: IoApic,
}

impl Devices {
    /// Devices as they were saved, or as they are when a machine is switched on.
    pub(super) fn new(saved: SavedDevices) -> anyhow::Result<Self> {
        let line = || Line::new().context("making an eventfd for an interrupt");
        let SavedDevices {
            uart,
            bell,
            io_apic,
        } = saved;
        let state = if uart == Uart::default() {
            SerialState::default()
        } else {
            SerialState {
                baud_divisor_low: uart.divisor[0],
                baud_divisor_high: uart.divisor[1],
                interrupt_enable: uart.interrupts[0],
                interrupt_identification: uart.interrupts[1],
                line_control: uart.line[0],
                line_status: uart.line[1],
                modem_control: uart.modem[0],
                modem_status: uart.modem[1],
                scratch: uart.scratch,
                in_buffer: Vec::new(),
            }
        };
        let uart = Serial::from_state(&state, line()?, NoEvents, Printer::default())
            .ok()
            .context("the VM's serial port was saved in an impossible state")?;
        Ok(Self {
            uart,
            bell,
            bell_line: line()?,
            io_apic,
        })
    }

    pub(super) fn save(&self) -> SavedDevices {
        let state = self.uart.state();
        SavedDevices {
            uart: Uart {
                divisor: [state.baud_divisor_low, state.baud_divisor_high],
                interrupts: [state.interrupt_enable, state.interrupt_identification],
                line: [state.line_control, state.line_status],
                modem: [state.modem_control, state.modem_status],
                scratch: state.scratch,
            },
            bell: self.bell,
            io_apic: self.io_apic.clone(),
        }
    }

    /// Connects the interrupt lines to the VM.
    pub(super) fn connect(&self, vm: &ApicVm) -> anyhow::Result<()> {
        vm.connect(&self.uart.interrupt_evt().0, UART_LINE)?;
        vm.connect(&self.bell_line.0, BELL_LINE)?;
        self.route(vm)
    }

    /// Tells KVM what the lines send now.
    pub(super) fn route(&self, vm: &ApicVm) -> anyhow::Result<()> {
        let routes: Vec<(u32, Message)> = [UART_LINE, BELL_LINE]
            .into_iter()
            .filter_map(|line| Some((line, self.io_apic.message(line)?)))
            .collect();
        Ok(vm.route(&routes)?)
    }

    /// Rings at the agent.
    pub(super) fn ring(&self) -> std::io::Result<()> {
        if self.bell.is_armed() {
            self.bell_line.trigger()?;
        }
        Ok(())
    }

    pub(super) fn console(&mut self) -> &mut Console {
        &mut self.uart.writer_mut().0
    }

    /// A write to a port. Nobody is at home at most of them.
    pub(super) fn port_written(&mut self, port: u16, value: u32) -> Asked {
        let byte = (value & 0xff) as u8;
        match port {
            DOORBELL_PORT => Asked::Doorbell(value),
            KEYBOARD if value == RESET => Asked::Reset,
            UART..=UART_LAST => {
                // Its writer cannot fail, and an interrupt that is lost because 2^64 others wait is none.
                if let Err(error) = self.uart.write((port - UART) as u8, byte) {
                    tracing::debug!(?error, "the serial port");
                }
                if port == UART {
                    Asked::Printed
                } else {
                    Asked::Nothing
                }
            }
            bell::FIRST..=bell::LAST => {
                self.bell.write(port, byte);
                Asked::Nothing
            }
            _ => Asked::Nothing,
        }
    }

    /// What a read from a port gives; an empty bus floats high.
    pub(super) fn port_read(&mut self, port: u16) -> u8 {
        match port {
            UART..=UART_LAST => self.uart.read((port - UART) as u8),
            bell::FIRST..=bell::LAST => self.bell.read(port),
            _ => 0xff,
        }
    }

    /// A write to memory that is none.
    pub(super) fn memory_written(&mut self, address: u64, value: u32) -> Asked {
        if IoApic::has(address) && self.io_apic.write(address, value) {
            Asked::Route
        } else {
            Asked::Nothing
        }
    }

    /// A read from memory that is none.
    pub(super) fn memory_read(&self, address: u64) -> u32 {
        if IoApic::has(address) {
            self.io_apic.read(address)
        } else {
            u32::MAX
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_restored_as_they_were() {
        let mut devices = Devices::new(SavedDevices::default()).unwrap();
        for (port, value) in [
            (UART + 3, 3),
            (UART + 1, 2),
            (UART + 7, 0x55),
            (0x37a, 0x1c),
        ] {
            assert_eq!(devices.port_written(port, value), Asked::Nothing);
        }
        assert_eq!(devices.memory_written(0xfec0_0000, 0x1e), Asked::Nothing);
        assert_eq!(devices.memory_written(0xfec0_0010, 0x31), Asked::Route);
        let saved = devices.save();
        let again = Devices::new(saved.clone()).unwrap();
        assert_eq!(again.save(), saved);
    }

    #[test]
    fn the_console_prints_and_a_reset_is_seen() {
        let mut devices = Devices::new(SavedDevices::default()).unwrap();
        for byte in b"hi\n" {
            assert_eq!(devices.port_written(UART, u32::from(*byte)), Asked::Printed);
        }
        assert_eq!(devices.console().take(), b"hi\n");
        assert_eq!(devices.port_written(0x64, 0xfe), Asked::Reset);
        assert_eq!(devices.port_written(DOORBELL_PORT, 9), Asked::Doorbell(9));
        assert_eq!(devices.port_read(0x71), 0xff);
    }

    proptest::proptest! {
        #[test]
        fn any_use_of_ports_and_memory_is_borne(uses: Vec<(u8, u16, u32)>) {
            let mut devices = Devices::new(SavedDevices::default()).unwrap();
            for (which, at, value) in uses {
                let near = [UART, bell::FIRST, KEYBOARD, at][usize::from(which) % 4].wrapping_add(at % 8);
                devices.port_written(near, value);
                devices.port_read(near);
                let address = 0xfec0_0000 + u64::from(at) % 0x200;
                devices.memory_written(address, value);
                devices.memory_read(address);
            }
            devices.save();
        }
    }
}
