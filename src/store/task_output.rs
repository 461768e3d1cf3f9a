//! What running tasks have written so far: pieces that are appended, so that a task's output costs what it is
//! long, however often it is written. A task that ends has it whole in its row, and no pieces.

use rusqlite::{Connection, params};

use super::now_ms;
use crate::session::PartialOutput;

/// A piece's row number grows with time, so it is the order of a task's pieces.
pub(super) const SCHEMA: &str = "
CREATE TABLE task_output (
    seq INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL,
    is_stderr INTEGER NOT NULL,
    text TEXT NOT NULL
) STRICT;
CREATE INDEX task_output_by_task ON task_output(task_id, seq);
";

/// What running tasks have written.
#[derive(Debug)]
pub struct TaskOutput;

impl TaskOutput {
    /// Appends what a running task has written since the last time. Nothing is kept of one that does not run.
    ///
    /// # Errors
    /// SQLite's.
    pub fn append(
        connection: &mut Connection,
        task: &str,
        new: &PartialOutput,
    ) -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        for (is_stderr, text) in [(false, &new.stdout), (true, &new.stderr)] {
            if text.is_empty() {
                continue;
            }
            transaction
                .prepare_cached(
                    "INSERT INTO task_output (task_id, is_stderr, text)
                     SELECT id, ?2, ?3 FROM tasks WHERE id = ?1 AND state = 'running'",
                )?
                .execute(params![task, is_stderr, text])?;
        }
        transaction.commit()
    }

    /// All that is stored of a running task's output.
    ///
    /// # Errors
    /// SQLite's.
    pub fn of(connection: &Connection, task: &str) -> rusqlite::Result<PartialOutput> {
        let mut whole = PartialOutput::default();
        let mut pieces = connection.prepare_cached(
            "SELECT is_stderr, text FROM task_output WHERE task_id = ?1 ORDER BY seq",
        )?;
        let mut rows = pieces.query([task])?;
        while let Some(row) = rows.next()? {
            let text = row.get_ref(1)?.as_str()?;
            match row.get(0)? {
                false => whole.stdout.push_str(text),
                true => whole.stderr.push_str(text),
            }
        }
        Ok(whole)
    }

    /// Forgets the pieces of a task whose row has its output now.
    ///
    /// # Errors
    /// SQLite's.
    pub(super) fn forget(connection: &Connection, task: &str) -> rusqlite::Result<()> {
        connection
            .prepare_cached("DELETE FROM task_output WHERE task_id = ?1")?
            .execute([task])?;
        Ok(())
    }

    /// At start-up: tasks that ran when the server stopped are interrupted, and say so. Their count.
    ///
    /// # Errors
    /// SQLite's.
    pub fn interrupt_running(
        connection: &mut Connection,
        note: &str,
        exit_code: i32,
    ) -> rusqlite::Result<usize> {
        let running: Vec<String> = connection
            .prepare("SELECT id FROM tasks WHERE state = 'running'")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        for task in &running {
            // One at a time, so that what is in memory is one task's output.
            let transaction = connection.transaction()?;
            let output = Self::of(&transaction, task)?;
            let ends_line = output.stderr.is_empty() || output.stderr.ends_with('\n');
            let gap = if ends_line { "" } else { "\n" };
            // Rows of before there were pieces have the beginning themselves.
            transaction.execute(
                "UPDATE tasks SET state = 'interrupted', finished_ms = ?2, exit_code = ?3,
                    execution_us = max(0, (?2 - coalesce(started_ms, ?2)) * 1000), cpu_us = 0,
                    stdout = stdout || ?4, stderr = stderr || ?5
                 WHERE id = ?1",
                params![
                    task,
                    now_ms(),
                    exit_code,
                    output.stdout,
                    format!("{}{gap}{note}", output.stderr)
                ],
            )?;
            Self::forget(&transaction, task)?;
            transaction.commit()?;
        }
        Ok(running.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Outcome;
    use crate::store::tasks::tests::task;
    use crate::store::{TaskEnd, TaskRow, TaskState, scratch};

    fn piece(stdout: &str, stderr: &str) -> PartialOutput {
        PartialOutput {
            stdout: stdout.into(),
            stderr: stderr.into(),
        }
    }

    fn pieces(connection: &Connection) -> rusqlite::Result<i64> {
        connection.query_row("SELECT count(*) FROM task_output", [], |row| row.get(0))
    }

    #[test]
    fn running_tasks_are_interrupted_with_their_output_and_queued_ones_stay() {
        let (_dir, store) = scratch();
        store
            .call_blocking(|c| {
                task("1", None, 1).insert(c, 9, true)?;
                task("2", None, 1).insert(c, 9, true)?;
                TaskRow::mark_running(c, "1")?;
                TaskOutput::append(c, "1", &piece("ha", ""))?;
                TaskOutput::append(c, "1", &piece("lf", "oops"))?;
                TaskOutput::append(c, "2", &piece("not", "running"))?;
                assert_eq!(TaskOutput::of(c, "1")?, piece("half", "oops"));
                assert_eq!(TaskOutput::interrupt_running(c, "note", 137)?, 1);
                let one = TaskRow::find(c, "t", "1")?.unwrap();
                assert_eq!(one.state, TaskState::Interrupted);
                assert_eq!(
                    (one.stdout.as_str(), one.stderr.as_str()),
                    ("half", "oops\nnote")
                );
                assert_eq!(one.exit_code, Some(137));
                assert_eq!(pieces(c)?, 0);
                let waiting = TaskRow::queued(c, 100)?;
                assert_eq!(waiting.len(), 1);
                assert_eq!(waiting[0].id, "2");
                assert!(TaskRow::find(c, "other", "1")?.is_none());
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn an_end_leaves_no_pieces_and_nothing_is_appended_after_it() {
        let (_dir, store) = scratch();
        store
            .call_blocking(|c| {
                task("1", None, 1).insert(c, 9, true)?;
                TaskRow::mark_running(c, "1")?;
                TaskOutput::append(c, "1", &piece("half", ""))?;
                let outcome = Outcome {
                    stdout: "half and half".into(),
                    ..Outcome::default()
                };
                let id = "1".to_owned();
                TaskEnd { id, outcome }.store(c)?;
                TaskOutput::append(c, "1", &piece("late", ""))?;
                assert_eq!(pieces(c)?, 0);
                let row = TaskRow::find(c, "t", "1")?.unwrap();
                assert_eq!(row.stdout, "half and half");
                Ok(())
            })
            .unwrap();
    }
}
