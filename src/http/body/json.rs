//! JSON bodies, and what is wrong with them in the words of Python's `json` module, which is what
//! FastAPI passes on: a message and the position as a count of characters.

use serde_json::{Value, json};

use crate::http::error::Fault;

/// Nesting that the fault finder follows. serde_json stops at 128 already.
const MOST_DEPTH: u32 = 200;

/// Reads a body.
///
/// # Errors
/// It is not JSON.
pub fn parse(text: &str) -> Result<Value, Box<Fault>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    serde_json::from_str(text).map_err(|error| {
        let (position, message) = find_fault(text).unwrap_or_else(|| {
            // Something Python would take: a lone surrogate, NaN, an endless number, deep nesting.
            (position_of(text, &error), plain_words(&error))
        });
        Box::new(Fault {
            kind: "json_invalid",
            loc: vec!["body".into(), position.into()],
            msg: "JSON decode error".into(),
            input: json!({}),
            ctx: Some(json!({ "error": message })),
        })
    })
}

fn plain_words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ")
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn position_of(text: &str, error: &serde_json::Error) -> usize {
    let lines = text.split_inclusive('\n');
    let before: usize = lines
        .take(error.line().saturating_sub(1))
        .map(str::len)
        .sum();
    let bytes = (before + error.column().saturating_sub(1)).min(text.len());
    text.as_bytes()[..bytes]
        .iter()
        .filter(|b| (**b & 0xc0) != 0x80)
        .count()
}

/// The first fault, as Python's decoder meets it.
fn find_fault(text: &str) -> Option<(usize, String)> {
    let chars: Vec<char> = text.chars().collect();
    let mut scan = Scan {
        chars: &chars,
        at: 0,
    };
    scan.blanks();
    let result = scan.value(0).and_then(|()| {
        scan.blanks();
        if scan.at < chars.len() {
            Err(Stop::Fault(scan.at, "Extra data"))
        } else {
            Ok(())
        }
    });
    match result {
        Err(Stop::Fault(at, message)) => Some((at, message.to_owned())),
        Err(Stop::TooDeep) | Ok(()) => None,
    }
}

enum Stop {
    Fault(usize, &'static str),
    TooDeep,
}

struct Scan<'a> {
    chars: &'a [char],
    at: usize,
}

impl Scan<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(' ' | '\t' | '\n' | '\r')) {
            self.at += 1;
        }
    }

    fn fault<T>(&self, message: &'static str) -> Result<T, Stop> {
        Err(Stop::Fault(self.at, message))
    }

    fn value(&mut self, depth: u32) -> Result<(), Stop> {
        if depth > MOST_DEPTH {
            return Err(Stop::TooDeep);
        }
        match self.peek() {
            Some('"') => self.string(),
            Some('{') => self.object(depth),
            Some('[') => self.array(depth),
            Some('-' | '0'..='9') => self.number(),
            _ => {
                for word in ["null", "true", "false"] {
                    let rest = &self.chars[self.at..];
                    if rest.len() >= word.len()
                        && word.chars().eq(rest[..word.len()].iter().copied())
                    {
                        self.at += word.len();
                        return Ok(());
                    }
                }
                self.fault("Expecting value")
            }
        }
    }

    fn object(&mut self, depth: u32) -> Result<(), Stop> {
        self.at += 1;
        self.blanks();
        if self.peek() == Some('}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            if self.peek() != Some('"') {
                return self.fault("Expecting property name enclosed in double quotes");
            }
            self.string()?;
            self.blanks();
            if self.peek() != Some(':') {
                return self.fault("Expecting ':' delimiter");
            }
            self.at += 1;
            self.blanks();
            self.value(depth + 1)?;
            if self.ends('}')? {
                return Ok(());
            }
        }
    }

    fn array(&mut self, depth: u32) -> Result<(), Stop> {
        self.at += 1;
        self.blanks();
        if self.peek() == Some(']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.value(depth + 1)?;
            if self.ends(']')? {
                return Ok(());
            }
        }
    }

    /// After a value: the end, or a comma and more.
    fn ends(&mut self, end: char) -> Result<bool, Stop> {
        self.blanks();
        match self.peek() {
            Some(c) if c == end => {
                self.at += 1;
                Ok(true)
            }
            Some(',') => {
                self.at += 1;
                self.blanks();
                Ok(false)
            }
            _ => self.fault("Expecting ',' delimiter"),
        }
    }

    fn string(&mut self) -> Result<(), Stop> {
        let start = self.at;
        let unterminated = Stop::Fault(start, "Unterminated string starting at");
        self.at += 1;
        loop {
            match self.peek() {
                None => return Err(unterminated),
                Some('"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some('\\') => match self.chars.get(self.at + 1) {
                    None => return Err(unterminated),
                    Some('"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => self.at += 2,
                    Some('u') => {
                        let digits = self.chars.get(self.at + 2..self.at + 6);
                        if !digits.is_some_and(|d| d.iter().all(char::is_ascii_hexdigit)) {
                            self.at += 1;
                            return self.fault("Invalid \\uXXXX escape");
                        }
                        self.at += 6;
                    }
                    Some(_) => return self.fault("Invalid \\escape"),
                },
                Some(c) if (c as u32) < 0x20 => return self.fault("Invalid control character at"),
                Some(_) => self.at += 1,
            }
        }
    }

    fn number(&mut self) -> Result<(), Stop> {
        let mut at = self.at + usize::from(self.peek() == Some('-'));
        let digits = |mut at: usize| {
            while self.chars.get(at).is_some_and(char::is_ascii_digit) {
                at += 1;
            }
            at
        };
        let whole = digits(at);
        if whole == at {
            return self.fault("Expecting value");
        }
        at = if self.chars[at] == '0' { at + 1 } else { whole };
        if self.chars.get(at) == Some(&'.') && digits(at + 1) > at + 1 {
            at = digits(at + 1);
        }
        if matches!(self.chars.get(at), Some('e' | 'E')) {
            let sign = usize::from(matches!(self.chars.get(at + 1), Some('+' | '-')));
            let end = digits(at + 1 + sign);
            if end > at + 1 + sign {
                at = end;
            }
        }
        self.at = at;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn faults_are_what_python_says() {
        // Each line as FastAPI answered it (Python 3.11).
        let table = [
            ("{", 1, "Expecting property name enclosed in double quotes"),
            ("{\"a\":}", 5, "Expecting value"),
            (
                "{\"a\":1,}",
                7,
                "Expecting property name enclosed in double quotes",
            ),
            ("[1", 2, "Expecting ',' delimiter"),
            ("{\"a\" 1}", 5, "Expecting ':' delimiter"),
            ("{\"a\":\"x\ny\"}", 7, "Invalid control character at"),
            ("nul", 0, "Expecting value"),
            ("{\"a\":1}x", 7, "Extra data"),
            ("  ", 2, "Expecting value"),
            ("{\"a\":\"\\q\"}", 6, "Invalid \\escape"),
            ("\"abc", 0, "Unterminated string starting at"),
            (
                "{'a':1}",
                1,
                "Expecting property name enclosed in double quotes",
            ),
            ("{\"a\":01}", 6, "Expecting ',' delimiter"),
            ("{\"a\":-}", 5, "Expecting value"),
            ("{\"a\":\"\\u12\"}", 7, "Invalid \\uXXXX escape"),
            ("{\"a\":1 \"b\":2}", 7, "Expecting ',' delimiter"),
            ("[1,]", 3, "Expecting value"),
            ("{\"a\":{\"b\":[1,2,}}", 15, "Expecting value"),
            ("{\"a\":1.}", 6, "Expecting ',' delimiter"),
            ("{\"é\":}", 5, "Expecting value"),
            ("\n\n{\"a\":}", 7, "Expecting value"),
        ];
        for (text, at, message) in table {
            let fault = parse(text).unwrap_err();
            assert_eq!(fault.loc, [json!("body"), json!(at)], "{text}");
            assert_eq!(fault.ctx, Some(json!({ "error": message })), "{text}");
        }
    }

    #[test]
    fn what_only_python_takes_is_refused_with_a_reason() {
        for text in ["{\"a\":\"\\ud800\"}", "[1e999]", &"[".repeat(5000), "NaN"] {
            let fault = parse(text).unwrap_err();
            assert_eq!(fault.kind, "json_invalid");
            assert_ne!(fault.ctx, Some(json!({ "error": "" })), "{text}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        assert_eq!(parse("\u{feff}{}").unwrap(), json!({}));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}|[\\[\\]{}:,\"\\\\u0-9e.+ \n-]{0,60}") {
            let ours = parse(&text);
            prop_assert_eq!(ours.is_ok(), serde_json::from_str::<Value>(text.trim_start_matches('\u{feff}')).is_ok());
        }

        #[test]
        fn a_fault_lies_within_the_text(text in "[\\[\\]{}:,\"\\\\u0-9e.+ a\n-]{0,60}") {
            if let Some((at, _)) = find_fault(&text) {
                prop_assert!(at <= text.chars().count());
            }
        }
    }
}
