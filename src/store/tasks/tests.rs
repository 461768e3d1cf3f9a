use super::*;
use crate::store::scratch;
use std::time::Duration;

pub(crate) fn task(id: &str, key: Option<&str>, hash: u8) -> NewTask {
    NewTask {
        id: id.into(),
        tenant: "t".into(),
        session_id: "s".into(),
        command: Command {
            context: None,
            live: false,
            language: Language::Bash,
            code: "true".into(),
            timeout: Duration::from_secs(5),
            answer_within: None,
        },
        max_vms: 3,
        idempotency_key: key.map(Into::into),
        body_hash: [hash; 32],
    }
}

#[test]
fn a_repeated_key_finds_the_first_task_and_only_for_the_same_body() {
    let (_dir, store) = scratch();
    store
        .call_blocking(|c| {
            assert_eq!(task("1", Some("k"), 1).insert(c, 9, true)?, Submitted::New);
            let again = task("2", Some("k"), 1).insert(c, 9, true)?;
            assert!(matches!(again, Submitted::Same { id, .. } if id == "1"));
            assert_eq!(
                task("3", Some("k"), 2).insert(c, 9, true)?,
                Submitted::KeyReused
            );
            assert_eq!(task("4", None, 1).insert(c, 9, true)?, Submitted::New);
            assert_eq!(task("5", None, 1).insert(c, 2, true)?, Submitted::Full(2));
            let again = task("6", Some("k"), 1).insert(c, 9, false)?;
            assert!(matches!(again, Submitted::Same { .. }));
            assert_eq!(
                task("7", None, 1).insert(c, 9, false)?,
                Submitted::TooMuchCode
            );
            Ok(())
        })
        .unwrap();
}

#[test]
fn only_complete_tasks_are_reaped() {
    let (_dir, store) = scratch();
    store
        .call_blocking(|c| {
            for id in ["1", "2", "3"] {
                task(id, None, 1).insert(c, 9, true)?;
            }
            for id in ["1", "2"] {
                let outcome = Outcome::default();
                TaskEnd {
                    id: id.into(),
                    outcome,
                }
                .store(c)?;
            }
            assert_eq!(TaskRow::reap(c, 0, 1, 10)?, 1);
            assert_eq!(TaskRow::reap(c, now_ms() + 1, 1, 10)?, 1);
            assert!(TaskRow::find(c, "t", "3")?.is_some());
            Ok(())
        })
        .unwrap();
}
