//! The agent from the host's side, without a VM: real interpreters, a socket for the wire.

// Not every test uses all of the shared support.
#[allow(dead_code)]
mod support;

use std::collections::BTreeMap;

use support::Host;
use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind};
use thaw_wire::message::{Language, Order, Renew, Report, Signal};

fn renew(seed: u8) -> Order {
    Order::Renew(Renew {
        generation: 1,
        seed: format!("{seed:02x}").repeat(32),
        wall_ns: 0,
        hostname: "h".into(),
        machine_id: "0".repeat(32),
        env: BTreeMap::from([("SESSION".into(), "it's one".into())]),
        terminals: Vec::new(),
    })
}

#[test]
fn python_keeps_state_and_reports_failures() {
    let mut host = Host::new("python");
    assert!(host.ready.languages.contains(&Language::Python));
    assert_eq!(host.python("x = 6").exit.exit_code, 0);
    assert_eq!(host.python("x * 7").out(), "42\n");
    let failed = host.python("print('so far'); 1/0");
    assert_eq!((failed.out(), failed.exit.exit_code), ("so far\n", 1));
    assert!(
        failed
            .err()
            .ends_with("ZeroDivisionError: division by zero\n")
    );
    assert_eq!(host.python("raise SystemExit(3)").exit.exit_code, 3);
    assert_eq!(host.python("x").out(), "6\n");
}

#[test]
fn bash_keeps_state_and_separates_outputs() {
    let mut host = Host::new("bash");
    assert_eq!(
        host.bash("cd /tmp; export A=1; f() { echo f$1; }; declare -A m=([k]=v)")
            .exit
            .exit_code,
        0
    );
    let outcome = host.bash("pwd; echo $A ${m[k]}; f 2; echo oops >&2; (exit 7)");
    assert_eq!(outcome.out(), "/tmp\n1 v\nf2\n");
    assert_eq!(outcome.err(), "oops\n");
    assert_eq!(outcome.exit.exit_code, 7);
    let outcome = host.bash("no_such_command");
    assert_eq!(
        (outcome.err(), outcome.exit.exit_code),
        ("bash: no_such_command: command not found\n", 127)
    );
    assert_eq!(host.bash("cat; read x; echo $?").out(), "1\n");
    let outcome = host.bash("echo a; if then");
    assert!(outcome.err().contains("syntax error"), "{outcome:?}");
    assert_eq!(outcome.exit.exit_code, 2);
    assert_eq!(host.bash("exec >/dev/null; echo lost").out(), "");
    assert_eq!(host.bash("echo seen").out(), "seen\n");
}

#[test]
fn a_shell_that_exits_hands_its_state_to_the_next() {
    let mut host = Host::new("bash-exit");
    host.bash("cd /tmp; B='two words'; f() { echo $B; }; export E=1");
    let outcome = host.bash("B='new words'; exit 5");
    assert_eq!(
        (outcome.exit.exit_code, outcome.exit.state_lost),
        (5, false)
    );
    let outcome = host.bash("pwd; f; env | grep ^E=");
    assert_eq!(outcome.out(), "/tmp\nnew words\nE=1\n");
    let outcome = host.bash("set -e; echo before; false; echo after");
    assert_eq!((outcome.out(), outcome.exit.exit_code), ("before\n", 1));
    assert_eq!(host.bash("f").out(), "new words\n");
    let outcome = host.bash("kill -9 $$");
    assert_eq!(
        (outcome.exit.exit_code, outcome.exit.state_lost),
        (137, true)
    );
    assert_eq!(host.bash("echo $B-").out(), "-\n");
}

#[test]
fn a_deadline_interrupts_and_keeps_state() {
    let mut host = Host::new("deadline");
    host.python("x = 1");
    let stream = host.start(
        Language::Python,
        "print('part')\nwhile True: pass",
        200,
        &[],
    );
    let outcome = host.finish(stream);
    assert_eq!(outcome.out(), "part\n");
    assert!(outcome.err().contains("KeyboardInterrupt"));
    assert_eq!(
        (
            outcome.exit.exit_code,
            outcome.exit.timed_out,
            outcome.exit.state_lost
        ),
        (124, true, false)
    );
    assert_eq!(host.python("x").out(), "1\n");

    host.bash("y=2");
    for code in [
        "echo part; sleep 60; echo never",
        "echo part; while :; do :; done; echo never",
        "echo part; while true; do sleep 0.1; done; echo never",
        "echo part; bash -c 'trap \"\" INT; sleep 60'; sleep 60; echo never",
        "echo part; sleep 60 | cat; echo never",
    ] {
        let stream = host.start(Language::Bash, code, 1500, &[]);
        let outcome = host.finish(stream);
        assert_eq!(outcome.out(), "part\n", "{code}");
        let exit = &outcome.exit;
        assert_eq!(
            (exit.exit_code, exit.timed_out, exit.state_lost),
            (124, true, false),
            "{code}"
        );
        assert_eq!(host.bash("echo $y").out(), "2\n", "{code}");
    }
}

#[test]
fn a_command_that_ignores_interrupts_loses_its_interpreter() {
    let mut host = Host::new("stubborn");
    host.python("x = 1");
    let code = "import signal, time\nprint('part', flush=True)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)";
    let stream = host.start(Language::Python, code, 1500, &[]);
    let outcome = host.finish(stream);
    assert_eq!(outcome.out(), "part\n");
    assert_eq!(
        (
            outcome.exit.exit_code,
            outcome.exit.timed_out,
            outcome.exit.state_lost
        ),
        (124, true, true)
    );
    assert!(host.python("x").err().contains("NameError"));
}

#[test]
fn signals_reach_their_command() {
    let mut host = Host::new("signals");
    let stream = host.start(Language::Python, "import time; time.sleep(60)", 60_000, &[]);
    host.signal(stream, Signal::Interrupt);
    // An interrupt before the command began is not for it, so it is repeated until it lands.
    std::thread::sleep(std::time::Duration::from_millis(300));
    host.signal(stream, Signal::Interrupt);
    let outcome = host.finish(stream);
    assert!([130, 137].contains(&outcome.exit.exit_code), "{outcome:?}");
    let stream = host.start(Language::Bash, "sleep 60", 60_000, &[]);
    host.signal(stream, Signal::Kill);
    let outcome = host.finish(stream);
    assert_eq!(
        (outcome.exit.exit_code, outcome.exit.state_lost),
        (137, true)
    );
    assert_eq!(host.bash("echo on").out(), "on\n");
}

#[test]
fn large_output_and_source_arrive_whole() {
    let mut host = Host::new("large");
    let outcome = host.python("import sys; sys.stdout.buffer.write(bytes(range(256)) * 20000);");
    assert_eq!(outcome.stdout.len(), 256 * 20000);
    assert!(outcome.stdout.chunks(256).all(|chunk| {
        chunk
            .iter()
            .enumerate()
            .all(|(n, byte)| n == *byte as usize)
    }));
    let outcome = host.bash("head -c 3000000 /dev/zero; echo end >&2");
    assert_eq!((outcome.stdout.len(), outcome.err()), (3_000_000, "end\n"));
    let long = "é".repeat(200_000);
    assert_eq!(host.python(&format!("len('{long}')")).out(), "200000\n");
    assert_eq!(
        host.bash(&format!("x={long}; echo ${{#x}}")).out(),
        "200000\n"
    );
}

#[test]
fn nothing_is_sent_beyond_credit() {
    let mut host = Host::new("credit");
    host.generous = false;
    let stream = host.start(
        Language::Bash,
        "head -c 1000000 /dev/zero; echo",
        20_000,
        &[],
    );
    let mut seen = 0;
    while seen < INITIAL_CREDIT {
        let frame = host.receive();
        assert_eq!(frame.kind, Kind::Stdout);
        seen += frame.payload.len() as u32;
    }
    assert_eq!(seen, INITIAL_CREDIT);
    // The command is stuck on its pipe now; everything else goes on.
    assert_eq!(
        host.order(&Order::Ping { token: 9 }),
        Report::Pong { token: 9 }
    );
    host.generous = true;
    host.send(&Frame::credit(stream, 1000));
    assert_eq!(host.finish(stream).stdout.len() as u32 + seen, 1_000_001);
}

#[test]
fn background_processes_do_not_hold_a_command() {
    let mut host = Host::new("background");
    let outcome = host.bash("sleep 60 & echo started");
    assert_eq!(outcome.out(), "started\n");
    assert!(outcome.exit.wall_us < 20_000_000);
    assert_eq!(host.bash("jobs -r | wc -l; kill %1").out(), "1\n");
    // What it prints between commands goes nowhere and blocks nobody.
    host.bash("{ head -c 1000000 /dev/zero; touch flooded; } &");
    let outcome =
        host.bash("for n in {1..100}; do [ -e flooded ] && break; sleep 0.1; done; [ -e flooded ]");
    assert_eq!(outcome.exit.exit_code, 0);
}

#[test]
fn one_command_of_a_language_at_a_time() {
    let mut host = Host::new("busy");
    let first = host.start(Language::Bash, "sleep 0.5; echo first", 20_000, &[]);
    let second = host.start(Language::Bash, "echo second", 20_000, &[]);
    let outcome = host.finish(second);
    assert_eq!(outcome.exit.exit_code, 126);
    assert!(outcome.exit.note.is_some());
    assert_eq!(host.finish(first).out(), "first\n");
    host.send(&Frame::new(77, Kind::Open, b"{}".to_vec()));
    assert_eq!(host.finish(77).exit.exit_code, 126);
}

#[test]
fn orders_are_answered() {
    let mut host = Host::new("orders");
    assert_eq!(
        host.order(&Order::Ping { token: 7 }),
        Report::Pong { token: 7 }
    );
    let Report::Warmed { missing } = host.order(&Order::Warm {
        modules: vec!["json".into(), "no_such_module".into()],
    }) else {
        panic!("not warmed")
    };
    assert_eq!(missing.keys().collect::<Vec<_>>(), ["no_such_module"]);
    assert_eq!(host.order(&Order::Quiesce), Report::Quiet);
    host.python("import random; before = random.getstate()");
    host.bash("echo $RANDOM >/dev/null");
    assert!(matches!(
        host.order(&renew(1)),
        Report::Renewed { generation: 1, .. }
    ));
    assert_eq!(host.python("random.getstate() == before").out(), "False\n");
    assert_eq!(
        host.python("import os; print(os.environ['SESSION'])").out(),
        "it's one\n"
    );
    assert_eq!(host.bash("echo $SESSION").out(), "it's one\n");
    let Order::Renew(malformed) = renew(1) else {
        unreachable!()
    };
    let malformed = Order::Renew(Renew {
        seed: "zz".into(),
        ..malformed
    });
    assert!(matches!(host.order(&malformed), Report::Failed { .. }));
}

/// A hang-up is reported for ever: an agent that listens on spins, ahead of everything else.
#[test]
fn a_hang_up_does_not_keep_the_agent_busy() {
    let mut host = Host::new("hang-up");
    host.python("import os; os.close(1); os.close(2)");
    host.bash("exec 202>&- 203>&-");
    let before = host.agent_ticks();
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(host.agent_ticks() - before < 20, "the agent spins");
    assert_eq!(
        host.order(&Order::Ping { token: 1 }),
        Report::Pong { token: 1 }
    );
    assert_eq!(host.python("os._exit(0)").exit.exit_code, 0);
    assert_eq!(host.python("print(1)").out(), "1\n");
}

#[test]
fn environment_of_one_command_ends_with_it() {
    let mut host = Host::new("env");
    for (language, code) in [
        (Language::Bash, "echo ${ONCE-none}"),
        (Language::Python, "!echo ${ONCE-none}"),
    ] {
        let stream = host.start(
            language,
            code,
            20_000,
            &[("ONCE", "a 'b'"), ("not a name", "x")],
        );
        assert_eq!(host.finish(stream).out(), "a 'b'\n");
        assert_eq!(host.run(language, code).out(), "none\n");
    }
}

#[test]
fn processor_time_is_counted() {
    let mut host = Host::new("cpu");
    for (language, code) in [
        (Language::Python, "sum(range(3000000))"),
        (Language::Bash, "for ((n = 0; n < 200000; n++)); do :; done"),
    ] {
        assert!(host.run(language, code).exit.cpu_us > 5000, "{language:?}");
        assert!(host.run(language, "").exit.cpu_us <= 10000, "{language:?}");
    }
}

#[test]
fn javascript_is_a_repl_with_await() {
    let mut host = Host::new("node");
    if !host.ready.languages.contains(&Language::Javascript) {
        eprintln!("this host has no node: nothing was tested");
        return;
    }
    let run = |host: &mut Host, code: &str| host.run(Language::Javascript, code);
    assert_eq!(run(&mut host, "const x = 20; let y = 1").out(), "");
    assert_eq!(run(&mut host, "x + y").out(), "21\n");
    assert_eq!(run(&mut host, "const x = 'again'; x").out(), "'again'\n");
    assert_eq!(run(&mut host, "({a: [1, 2]})").out(), "{ a: [ 1, 2 ] }\n");
    assert_eq!(
        run(&mut host, "await new Promise(r => setTimeout(r, 10, 5n))").out(),
        "5n\n"
    );
    assert_eq!(
        run(
            &mut host,
            "setTimeout(() => console.log('late'), 50)\nconsole.log('early')"
        )
        .out(),
        "early\nlate\n"
    );
    let main =
        "async function main() { await null; console.log(require('fs').existsSync('/')) }\nmain()";
    assert_eq!(run(&mut host, main).out(), "true\n");
    let failed = run(&mut host, "console.log('so far'); null.f");
    assert_eq!((failed.out(), failed.exit.exit_code), ("so far\n", 1));
    assert!(failed.err().contains("TypeError"), "{failed:?}");
    let failed = run(&mut host, "let = = 1");
    assert!(failed.err().contains("SyntaxError"), "{failed:?}");
    assert_eq!(run(&mut host, "process.exit(4)").exit.exit_code, 4);
    assert_eq!(run(&mut host, "throw 5").exit.exit_code, 1);
    for code in [
        "console.log('part'); while (true) {}",
        "console.log('part'); await new Promise(() => {})",
    ] {
        let stream = host.start(Language::Javascript, code, 1500, &[]);
        let outcome = host.finish(stream);
        assert_eq!(outcome.out(), "part\n");
        assert_eq!(
            (outcome.exit.exit_code, outcome.exit.state_lost),
            (124, false),
            "{outcome:?}"
        );
    }
    assert_eq!(run(&mut host, "x").out(), "'again'\n");
    assert!(matches!(host.order(&renew(2)), Report::Renewed { .. }));
    assert_eq!(
        run(&mut host, "process.env.SESSION").out(),
        "\"it's one\"\n"
    );
    assert_eq!(run(&mut host, "crypto.randomUUID().length").out(), "36\n");
}
