//! Every parser of a request's bytes under made-up input: whatever comes, none may panic, hang or take
//! more than its input's size in memory.
//!
//! `THAW_FUZZ_SECONDS` says how long (default 3, so that it is part of every test run; ten minutes
//! before a release).

use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use thaw::config::VmConfig;
use thaw::http::body::{Body, form, password_form};
use thaw::session::{ContextName, SessionId};
use thaw::terminal::TerminalId;

/// Requests that are right, from which wrong ones are made.
const SEEDS: &[&str] = &[
    r#"{"command": "print(1)", "session_id": "550e8400-e29b-41d4-a716-446655440000", "language": "python", "timeout": 60, "vault_ids": ["a"], "context": "c.1", "api_key": "k"}"#,
    r#"{"api_key": "k", "vm_lifetime_seconds": 300, "memory_mb": 512, "vcpu_count": 2, "metadata": {"a": [1, null, {"b": 1e9}]}, "env": {"A": "b"}}"#,
    r#"{"cols": 80, "rows": 24, "shell": "/bin/bash", "command": "a \u00e9 \ud83e\udd80", "id": "x", "path": "/tmp", "parents": true}"#,
    "grant_type=password&username=a%20b&password=%ff%00&scope=",
    "--b\r\nContent-Disposition: form-data; name=\"remote_path\"\r\n\r\n/tmp/x\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"../x\"\r\nContent-Type: text/plain\r\n\r\nbytes\r\n--b--\r\n",
    "[[[[[[[[[[{}]]]]]]]]]]",
    "1e999 -0 \"\\ud800\" nul",
];

/// Longest input: a few of the parsers' own buffers.
const MOST: usize = 16 << 10;

fn mutate(random: &mut StdRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(1..8) {
        let at = random.random_range(0..=bytes.len());
        let piece = SEEDS[random.random_range(0..SEEDS.len())].as_bytes();
        match random.random_range(0..6) {
            0 if at < bytes.len() => bytes[at] = random.random(),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 => bytes.insert(at, random.random()),
            3 => bytes.truncate(at),
            4 => {
                let from = random.random_range(0..piece.len());
                let piece = &piece[from..(from + 40).min(piece.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            _ => {
                // Depth and length are attacks of their own.
                let byte = *b"[{\"9\\,:-e"
                    .get(random.random_range(0..9))
                    .unwrap_or(&b'[');
                let count = random.random_range(1..2000);
                bytes.splice(at..at, std::iter::repeat_n(byte, count));
            }
        }
    }
    bytes.truncate(MOST);
}

async fn multipart(bytes: Bytes) {
    let pieces = futures_util::stream::iter([Ok::<_, std::io::Error>(bytes)]);
    let mut parts = multer::Multipart::new(pieces, "b");
    while let Ok(Some(mut field)) = parts.next_field().await {
        while let Ok(Some(_)) = field.chunk().await {}
    }
}

fn bodies(bytes: &[u8]) {
    let defaults = VmConfig::default();
    for body in [Body::parse(bytes), Body::parse_optional(bytes)]
        .into_iter()
        .flatten()
    {
        let told = [
            body.command().err(),
            body.session(false, &defaults).err(),
            body.session(true, &defaults).err(),
            body.kill().err(),
            body.fields(|fields| {
                fields.required_string("path");
                fields.optional_flag("parents");
                fields.int("cols", 80, 1, 1000);
                fields.strings("vault_ids");
                fields.string_map("env");
            })
            .err(),
        ];
        for error in told.into_iter().flatten() {
            let status = error.status().as_u16();
            assert!(status == 400 || status == 422, "{status}");
            assert!(error.detail().len() < 64 << 10, "an answer is no echo");
        }
    }
    let pairs = form(bytes, |fields| {
        fields.required_string("filename");
        fields.required_string("session_id");
    });
    drop((pairs, password_form(bytes)));
    if let Ok(text) = std::str::from_utf8(bytes) {
        for id in [SessionId::parse(text)].into_iter().flatten() {
            assert_eq!(id.to_string(), text.to_ascii_lowercase());
        }
        assert!(ContextName::parse(text).is_none_or(|name| name.as_str() == text));
        assert!(TerminalId::parse(text).is_none_or(|name| name.as_str() == text));
    }
}

#[test]
fn no_request_makes_a_parser_panic() {
    let seconds = std::env::var("THAW_FUZZ_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(3);
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut rounds, mut slowest) = (0_u64, Duration::ZERO);
    while Instant::now() < end {
        let mut bytes = SEEDS[random.random_range(0..SEEDS.len())]
            .as_bytes()
            .to_vec();
        mutate(&mut random, &mut bytes);
        let start = Instant::now();
        bodies(&bytes);
        runtime.block_on(multipart(bytes.into()));
        slowest = slowest.max(start.elapsed());
        rounds += 1;
    }
    println!("{rounds} inputs, the slowest took {slowest:?}");
    assert!(rounds > 100, "{rounds} inputs in {seconds} s");
}
