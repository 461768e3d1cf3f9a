//! Several interpreters in one session, what they show, and who watches.

// Not every test uses all of the shared support.
#[allow(dead_code)]
mod support;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::{Host, Outcome};
use thaw_wire::frame::{Frame, INITIAL_CREDIT, Kind};
use thaw_wire::message::Language::{Bash, Javascript, Python};
use thaw_wire::message::{Order, Renew, Report};

fn within(host: &mut Host, context: Option<&str>, code: &str) -> Outcome {
    let stream = host.begin(Python, code, context, false);
    host.finish(stream)
}

#[test]
fn contexts_have_variables_of_their_own() {
    let mut host = Host::new("contexts");
    for (context, value) in [(None, "1"), (Some("a"), "2"), (Some("b"), "3")] {
        let done = within(&mut host, context, &format!("x = {value}"));
        assert_eq!(done.exit.exit_code, 0, "{:?}", done.exit.note);
    }
    assert_eq!(within(&mut host, Some("a"), "x").out(), "2\n");
    assert_eq!(within(&mut host, None, "x").out(), "1\n");
    assert_eq!(within(&mut host, Some("b"), "x").out(), "3\n");
    // A shell's directory is its context's, too, and a shell that ends keeps its state.
    shell(&mut host, Some("a"), "cd /tmp; v=1");
    let here = shell(&mut host, None, "echo $PWD");
    assert_eq!(shell(&mut host, None, "echo $PWD $v"), here);
    shell(&mut host, Some("a"), "exit 3");
    assert_eq!(shell(&mut host, Some("a"), "echo $PWD $v"), "/tmp 1\n");
}

#[test]
fn contexts_run_at_the_same_time_and_a_dead_one_is_replaced() {
    let mut host = Host::new("contexts-parallel");
    let long = host.begin(
        Python,
        "import time; time.sleep(2); 'long'",
        Some("slow"),
        false,
    );
    let began = Instant::now();
    assert_eq!(
        within(&mut host, Some("fast"), "'short'").out(),
        "'short'\n"
    );
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(host.finish(long).out(), "'long'\n");
    let died = within(&mut host, Some("fast"), "import os; os._exit(9)");
    assert_eq!(died.exit.exit_code, 9);
    assert_eq!(within(&mut host, Some("fast"), "1 + 1").out(), "2\n");
}

/// A shell's answer.
fn shell(host: &mut Host, context: Option<&str>, code: &str) -> String {
    let stream = host.begin(Bash, code, context, false);
    host.finish(stream).out().to_owned()
}

#[test]
fn environment_and_files_of_contexts_are_their_own() {
    let mut host = Host::new("contexts-apart");
    let code = "import os; os.environ['V'] = 'a'; os.chdir('/tmp')";
    assert_eq!(within(&mut host, Some("a"), code).exit.exit_code, 0);
    for context in [None, Some("b")] {
        let code = "import os; os.environ.get('V'), os.getcwd() == '/tmp'";
        assert_eq!(within(&mut host, context, code).out(), "(None, False)\n");
    }
    // Two shells at once, of which each reads what was written down for it.
    let slow = host.begin(Bash, "v=slow; sleep 1; echo $v", Some("a"), false);
    assert_eq!(shell(&mut host, Some("b"), "v=fast; echo $v"), "fast\n");
    assert_eq!(shell(&mut host, None, "echo [$v]"), "[]\n");
    assert_eq!(host.finish(slow).out(), "slow\n");
    // Names count by language, and one command runs in each at a time.
    let first = host.begin(Python, "import time; time.sleep(1)", Some("a"), false);
    let second = within(&mut host, Some("a"), "1").exit;
    assert_eq!(second.exit_code, 126);
    assert_eq!(shell(&mut host, Some("a"), "echo $v"), "slow\n");
    assert_eq!(host.finish(first).exit.exit_code, 0);
}

#[test]
fn a_deadline_in_one_context_is_none_in_another() {
    let mut host = Host::new("contexts-deadline");
    let other = host.begin(
        Python,
        "import time; time.sleep(3); 'whole'",
        Some("a"),
        false,
    );
    let stubborn =
        "import time\nwhile True:\n    try: time.sleep(9)\n    except KeyboardInterrupt: pass";
    let late = host.start(Python, stubborn, 300, &[]);
    let late = host.finish(late).exit;
    assert!(late.timed_out && late.state_lost, "{late:?}");
    assert_eq!(host.finish(other).out(), "'whole'\n");
}

#[test]
fn orders_reach_contexts_and_do_not_wait_for_busy_ones() {
    let mut host = Host::new("contexts-orders");
    let code = "import os, random; state = random.getstate()";
    for context in [Some("a"), Some("b")] {
        assert_eq!(within(&mut host, context, code).exit.exit_code, 0);
    }
    assert_eq!(shell(&mut host, Some("a"), "v=1"), "");
    let busy = host.begin(Python, "import time; time.sleep(3)", Some("b"), false);
    let began = Instant::now();
    let renew = Order::Renew(Renew {
        generation: 7,
        seed: "ab".repeat(32),
        wall_ns: 1,
        hostname: "h".into(),
        machine_id: "0".repeat(32),
        env: [("SESSION".to_owned(), "s".to_owned())].into(),
        terminals: Vec::new(),
    });
    assert!(matches!(host.order(&renew), Report::Renewed { .. }));
    let Report::Warmed { missing } = host.order(&Order::Warm {
        modules: vec!["colorsys".into(), "no_such_module".into()],
    }) else {
        panic!("the order to warm is answered");
    };
    assert!(missing.keys().eq(["no_such_module"]), "{missing:?}");
    assert_eq!(host.order(&Order::Quiesce), Report::Quiet);
    assert!(began.elapsed() < Duration::from_secs(3), "waited for busy");
    let renewed = "os.environ['SESSION'], random.getstate() != state";
    let imported = "import sys; 'colorsys' in sys.modules";
    assert_eq!(within(&mut host, Some("a"), imported).out(), "True\n");
    host.finish(busy);
    for context in [Some("a"), Some("b")] {
        assert_eq!(within(&mut host, context, renewed).out(), "('s', True)\n");
    }
    assert_eq!(shell(&mut host, Some("a"), "echo $v $SESSION"), "1 s\n");
    // One that starts later has it as well.
    let late = within(&mut host, Some("late"), "import os; os.environ['SESSION']");
    assert_eq!(late.out(), "'s'\n");
}

#[test]
fn contexts_are_bounded_and_their_names_checked() {
    let mut host = Host::new("contexts-bound");
    // What cannot start, here for want of a directory, does not count.
    host.python("import os; home = os.getcwd(); os.rmdir(home)");
    for number in 0..20 {
        let refused = within(&mut host, Some(&format!("lost{number}")), "1").exit;
        assert_eq!(refused.exit_code, 126);
    }
    host.python("os.mkdir(home)");
    for number in 0..16 {
        let stream = host.begin(Bash, "true", Some(&format!("c{number}")), false);
        assert_eq!(host.finish(stream).exit.exit_code, 0);
    }
    for name in ["c16", "a/b", "..", ""] {
        let refused = within(&mut host, Some(name), "1").exit;
        assert_eq!(refused.exit_code, 126, "{name}");
        let note = refused.note.unwrap();
        let said = if name == "c16" { "16" } else { "64" };
        assert!(note.contains(said), "{note}");
    }
    assert_eq!(shell(&mut host, Some("c15"), "echo on"), "on\n");
    assert_eq!(host.python("1").out(), "1\n");
}

#[test]
fn values_are_shown_in_all_their_representations() {
    let mut host = Host::new("rich");
    let rich =
        |outcome: &Outcome| -> serde_json::Value { serde_json::from_slice(&outcome.rich).unwrap() };
    let one = host.python("1 + 1");
    assert_eq!(rich(&one), serde_json::json!([{ "text/plain": "2" }]));
    let code = "class Shown:\n    def _repr_html_(self): return '<b>x</b>'\n    def _repr_png_(self): return b'\\x89PNG' * 50000\n    def __repr__(self): return 'Shown'\ndisplay([1])\nShown()";
    let two = host.python(code);
    assert_eq!(two.out(), "[1]\nShown\n");
    let shown = rich(&two);
    assert_eq!(shown[0]["application/json"], serde_json::json!([1]));
    assert_eq!(shown[1]["text/html"], "<b>x</b>");
    assert!(shown[1]["image/png"].as_str().unwrap().len() > 250_000);
    let none = host.python("x = 1");
    assert!(none.rich.is_empty() && none.err().is_empty());
    // As much as a command may show, in pieces and under credit.
    let much = host.python(
        "for _ in range(8): display({'text/plain': '', 'text/html': 'x' * 1_000_000}, raw=True)",
    );
    assert_eq!(rich(&much).as_array().unwrap().len(), 8);
    if host.ready.languages.contains(&Javascript) {
        let echoed = host.run(Javascript, "[1, 'a\\ud800']");
        let text = echoed.out().trim_end();
        assert_eq!(rich(&echoed), serde_json::json!([{ "text/plain": text }]));
        assert!(host.run(Javascript, "let y = 1").rich.is_empty());
    }
}

#[test]
fn results_wait_for_credit_and_come_before_the_end() {
    let mut host = Host::new("rich-credit");
    let code = "display({'text/plain': 'p', 'text/html': 'x' * 400_000}, raw=True)";
    let stream = host.begin(Python, code, None, false);
    let mut taken = 0;
    while taken < INITIAL_CREDIT as usize {
        let frame = host.receive();
        assert!(matches!(frame.kind, Kind::Stdout | Kind::Rich), "{frame:?}");
        taken += frame.payload.len();
    }
    assert_eq!(taken, INITIAL_CREDIT as usize);
    // No more of it is on its way: other frames are answered first.
    assert_eq!(
        host.order(&Order::Ping { token: 1 }),
        Report::Pong { token: 1 }
    );
    host.send(&Frame::credit(stream, 1 << 20));
    let done = host.finish(stream);
    assert_eq!(done.exit.exit_code, 0);
    assert!(taken + done.rich.len() > 400_000);
}

#[test]
fn what_is_watched_leaves_as_it_is_printed() {
    let mut host = Host::new("live");
    let code = "import time\nprint('line')\ntime.sleep(3)\nprint('rest', end='')\ntime.sleep(3)";
    let stream = host.begin(Python, code, None, true);
    let next = |host: &mut Host| -> (Vec<u8>, Instant) {
        loop {
            let frame = host.receive();
            if frame.stream == stream && frame.kind == Kind::Stdout {
                host.send(&Frame::credit(stream, frame.payload.len() as u32));
                return (frame.payload, Instant::now());
            }
        }
    };
    let (line, first) = next(&mut host);
    assert_eq!(line, b"line\n");
    let (rest, second) = next(&mut host);
    assert_eq!(rest, b"rest");
    // Each came while the command slept, not at its end.
    let apart = second - first;
    assert!(
        apart > Duration::from_secs(2) && apart < Duration::from_secs(5),
        "{apart:?}"
    );
    assert_eq!(host.finish(stream).exit.exit_code, 0);
    // Soon is a matter of milliseconds, measured here by the clock that both sides share.
    let code = "import sys, time\nfor n in range(5):\n    print(time.time(), file=(sys.stdout, sys.stderr)[n % 2])\n    time.sleep(0.3)";
    host.begin(Python, code, None, true);
    let mut delays = Vec::new();
    while delays.len() < 5 {
        let frame = host.receive();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(matches!(frame.kind, Kind::Stdout | Kind::Stderr));
        let printed = std::str::from_utf8(&frame.payload).unwrap().trim();
        delays.push(now.as_secs_f64() - printed.parse::<f64>().unwrap());
    }
    delays.sort_by(f64::total_cmp);
    // The middle one: this machine may be busy with something else.
    assert!(delays[2] < 0.02, "{delays:?}");
}
