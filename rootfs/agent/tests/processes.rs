//! Processes beside the commands: terminals, their bounds and their ends.

// Not every test uses all of the shared support.
#[allow(dead_code)]
mod support;

use std::time::{Duration, Instant};

use support::Host;
use support::processes::{Processes, command};
use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind, MAX_PAYLOAD};
use thaw_wire::message::{Exit, Signal, Size};

#[test]
fn a_process_has_input_output_and_an_end() {
    let mut host = Host::new("process");
    host.open(100, command(&["sh", "-c", "cat; echo err >&2; exit 7"]));
    host.feed(100, b"hello");
    let outcome = host.finish(100);
    assert_eq!((outcome.out(), outcome.err()), ("hello", "err\n"));
    assert_eq!(outcome.exit.exit_code, 7);
    host.open(101, command(&["no-such-program"]));
    let missing = host.finish(101).exit;
    assert_eq!(missing.exit_code, 127);
    assert!(missing.note.is_some());
    // What it leaves behind does not hold up its end.
    host.open(102, command(&["sh", "-c", "sleep 60 & echo begun"]));
    let began = Instant::now();
    assert_eq!(host.finish(102).out(), "begun\n");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn signals_reach_the_whole_group() {
    let mut host = Host::new("process-signals");
    for (stream, signal, code) in [
        (100, Signal::Interrupt, 130),
        (101, Signal::Kill, 137),
        (102, Signal::Hangup, 129),
    ] {
        host.open(stream, command(&["sleep", "600"]));
        std::thread::sleep(Duration::from_millis(100));
        host.signal(stream, signal);
        assert_eq!(host.finish(stream).exit.exit_code, code);
    }
    // Who ignores a hang-up is killed.
    host.open(
        103,
        command(&["sh", "-c", "trap '' HUP; echo deaf; sleep 600"]),
    );
    host.until(103, "deaf");
    host.signal(103, Signal::Hangup);
    assert_eq!(host.finish(103).exit.exit_code, 137);
}

#[test]
fn a_terminal_is_one() {
    let mut host = Host::new("terminal");
    let mut shell = command(&["bash", "--norc", "-i"]);
    shell.terminal = Some(Size { cols: 91, rows: 33 });
    shell.env.insert("PS1".into(), "ready> ".into());
    host.open(100, shell);
    host.until(100, "ready> ");
    let say = |host: &mut Host, line: &str, answer: &str| {
        host.send(&Frame::new(100, Kind::Stdin, line.into()));
        host.until(100, answer)
    };
    say(&mut host, "stty size; echo $TERM\n", "33 91");
    host.signal(
        100,
        Signal::Resize(Size {
            cols: 120,
            rows: 40,
        }),
    );
    say(&mut host, "stty size\n", "40 120");
    say(&mut host, "tty && echo is-a\"-\"tty\n", "is-a-tty");
    // Ctrl-C interrupts what runs in it, not the shell. That it runs, it must say itself: between a
    // shell's fork and exec an interrupt is lost.
    say(&mut host, "cat <(echo g''o) -\n", "go\r\n");
    say(&mut host, "\x03", "ready> ");
    host.send(&Frame::new(100, Kind::Stdin, b"exit 5\n".to_vec()));
    assert_eq!(host.finish(100).exit.exit_code, 5);
}

#[test]
fn output_waits_for_credit_and_input_for_its_reader() {
    let mut host = Host::new("process-credit");
    host.generous = false;
    host.open(
        100,
        command(&["sh", "-c", "head -c 1000000 /dev/zero; echo done >&2"]),
    );
    let mut seen = 0;
    while seen < INITIAL_CREDIT as usize {
        let frame = host.receive();
        assert_eq!(frame.kind, Kind::Stdout);
        seen += frame.payload.len();
    }
    assert_eq!(seen, INITIAL_CREDIT as usize);
    host.send(&Frame::credit(100, 10_000_000));
    assert_eq!(seen + host.finish(100).stdout.len(), 1_000_000);
    // A process that does not read gets its first window and no more.
    host.open(101, command(&["sleep", "1"]));
    host.send(&Frame::new(101, Kind::Stdin, vec![1; MAX_PAYLOAD]));
    host.send(&Frame::new(101, Kind::Stdin, vec![1; MAX_PAYLOAD]));
    let mut granted = 0;
    let exit: Exit = loop {
        let frame = host.receive();
        match frame.kind {
            Kind::Credit => granted += u32::from_le_bytes(frame.payload.try_into().unwrap()),
            Kind::Exit => break serde_json::from_slice(&frame.payload).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(exit.exit_code, 0);
    assert!(granted <= INITIAL_CREDIT, "{granted}");
}

#[test]
fn processes_are_bounded() {
    let mut host = Host::new("process-bound");
    for stream in 100..132 {
        host.open(stream, command(&["sleep", "600"]));
    }
    host.open(132, command(&["true"]));
    let refused = host.finish(132).exit;
    assert_eq!(refused.exit_code, 126);
    assert!(refused.note.unwrap().contains("32"));
    assert_eq!(host.python("1 + 1").out(), "2\n");
    for stream in 100..132 {
        host.signal(stream, Signal::Kill);
        host.finish(stream);
    }
    host.open(133, command(&["true"]));
    assert_eq!(host.finish(133).exit.exit_code, 0);
}

/// Processes whose command line is exactly this.
fn running(line: &str) -> usize {
    let found = std::process::Command::new("pgrep")
        .args(["-fx", line])
        .output()
        .unwrap();
    found.stdout.iter().filter(|byte| **byte == b'\n').count()
}

#[test]
fn a_kill_ends_what_nobody_reads_on() {
    let mut host = Host::new("process-unread");
    host.generous = false;
    host.open(100, command(&["head", "-c", "1000000", "/dev/zero"]));
    host.open(101, command(&["sh", "-c", "head -c 190000 /dev/zero"]));
    std::thread::sleep(Duration::from_millis(500));
    // The second has ended by itself; what it wrote waits in its pipe.
    for (stream, code) in [(100, 137), (101, 0)] {
        host.signal(stream, Signal::Kill);
        assert_eq!(host.finish(stream).exit.exit_code, code);
    }
}

#[test]
fn who_is_left_behind_cannot_go_on_writing() {
    let mut host = Host::new("process-flood");
    host.open(100, command(&["sh", "-c", "yes & echo $! >&2"]));
    let outcome = host.finish(100);
    assert_eq!(outcome.exit.exit_code, 0);
    let yes: i32 = outcome.err().trim().parse().unwrap();
    // Its pipe is closed, so that it ends, too.
    let gone = || !std::path::Path::new(&format!("/proc/{yes}/cmdline")).exists();
    for _ in 0..100 {
        if gone() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("yes still runs");
}

#[test]
fn a_terminal_that_is_killed_takes_everything_along() {
    let mut host = Host::new("terminal-kill");
    let line = format!("sleep 6{}", std::process::id());
    // Jobs have groups of their own, and this one does not mind a hang-up.
    let code = format!("(trap '' HUP; exec {line}) & echo g''o; sleep 600");
    let mut shell = command(&["bash", "--norc", "-i", "-c", &format!("set -m; {code}")]);
    shell.terminal = Some(Size { cols: 80, rows: 24 });
    host.open(100, shell);
    host.until(100, "go");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(running(&line), 1);
    host.signal(100, Signal::Kill);
    assert_eq!(host.finish(100).exit.exit_code, 137);
    assert_eq!(running(&line), 0);
}

#[test]
fn a_terminal_that_its_program_leaves_is_over() {
    let mut host = Host::new("terminal-left");
    let code = "import os, time\nfor fd in range(20):\n    try: os.close(fd)\n    except OSError: pass\ntime.sleep(600)";
    let mut leaver = command(&["python3", "-c", code]);
    leaver.terminal = Some(Size { cols: 80, rows: 24 });
    let before = host.agent_ticks();
    host.open(100, leaver);
    // Its other end closes, which hangs it up, as when a window is closed.
    assert_eq!(host.finish(100).exit.exit_code, 129);
    assert!(host.agent_ticks() - before < 20, "the agent spins");
}

#[test]
fn a_login_shell_starts_on_a_terminal_and_nothing_leaks_into_it() {
    let mut host = Host::new("terminal-login");
    let mut shell = command(&["bash", "-il"]);
    shell.terminal = Some(Size { cols: 70, rows: 20 });
    host.open(100, shell);
    let line = b"stty size; echo $TERM-$COLUMNS; ls -l /proc/self/fd | grep -c /dev/p; exit 9\n";
    host.send(&Frame::new(100, Kind::Stdin, line.to_vec()));
    let outcome = host.finish(100);
    let said = outcome.out();
    assert!(said.contains("20 70\r\n"), "{said}");
    assert!(said.contains("xterm-256color-"), "{said}");
    // Standard input and error; the standard output of that program was a pipe.
    assert!(said.contains("\n2\r\n"), "{said}");
    assert_eq!(outcome.exit.exit_code, 9);
}

#[test]
fn input_without_credit_ends_its_process_and_no_other() {
    let mut host = Host::new("process-overrun");
    host.open(100, command(&["sleep", "600"]));
    host.open(101, command(&["cat"]));
    for _ in 0..10 {
        host.send(&Frame::new(100, Kind::Stdin, vec![1; MAX_PAYLOAD]));
    }
    assert_eq!(host.finish(100).exit.exit_code, 137);
    host.feed(101, b"on");
    assert_eq!(host.finish(101).out(), "on");
}

#[test]
fn processor_time_of_a_process_is_told() {
    let mut host = Host::new("process-cpu");
    let code = "for ((n = 0; n < 100000; n++)); do :; done";
    host.open(100, command(&["bash", "-c", code]));
    assert!(host.finish(100).exit.cpu_us > 10_000);
}
