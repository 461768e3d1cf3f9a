//! Reads the fields of an object as pydantic 2 does in its lax mode, and collects everything that is
//! wrong instead of stopping at the first.

use serde_json::{Map, Value, json};

use crate::http::error::Fault;

/// Longest text of an `input` that is sent back; a longer one is named by its size.
const MOST_ECHO: usize = 4096;

/// Fields whose values are never sent back.
const SECRET: &[&str] = &["api_key", "password", "env"];

/// An object's fields, as they are read one by one.
#[derive(Debug)]
pub struct Fields<'a> {
    /// First word of every fault's place.
    root: &'static str,
    object: &'a Map<String, Value>,
    faults: Vec<Fault>,
}

impl<'a> Fields<'a> {
    /// Starts to read a body.
    ///
    /// # Errors
    /// It is not an object.
    pub fn of(body: &'a Value) -> Result<Self, Box<Fault>> {
        match body {
            Value::Object(object) => Ok(Self {
                root: "body",
                object,
                faults: Vec::new(),
            }),
            other => Err(Box::new(Fault {
                kind: "model_attributes_type",
                loc: vec!["body".into()],
                msg: "Input should be a valid dictionary or object to extract fields from".into(),
                input: echo(other),
                ctx: None,
            })),
        }
    }

    /// Starts to read the parameters of a query, all of them texts.
    pub fn of_query(parameters: &'a Map<String, Value>) -> Self {
        Self {
            root: "query",
            object: parameters,
            faults: Vec::new(),
        }
    }

    /// Notes that a field must be there, if it is not.
    pub fn must_be_given(&mut self, name: &str) {
        if !self.object.contains_key(name) {
            let input = self.input();
            self.fault(&[name], "missing", "Field required", input, None);
        }
    }

    /// Whether a field is there and not null.
    pub fn given(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(|value| !value.is_null())
    }

    /// A field as it is.
    pub fn raw(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name)
    }

    /// Reads the fields of an object within this one. What is wrong there is told with its place.
    pub fn nested<T>(&mut self, name: &str, read: impl FnOnce(&mut Fields<'_>) -> T) -> Option<T> {
        let object = self.object(name)?;
        let mut inner = Fields {
            root: self.root,
            object,
            faults: Vec::new(),
        };
        let value = read(&mut inner);
        self.faults
            .extend(inner.faults.into_iter().map(|mut fault| {
                fault.loc.insert(1, name.into());
                fault
            }));
        Some(value)
    }

    /// Nothing was wrong, or all that was.
    ///
    /// # Errors
    /// The faults, in the order in which the fields were read.
    pub fn finish(self) -> Result<(), Vec<Fault>> {
        if self.faults.is_empty() {
            Ok(())
        } else {
            Err(self.faults)
        }
    }

    /// The whole object, as it may be sent back.
    pub fn input(&self) -> Value {
        let shown = self.object.iter().map(|(name, value)| {
            let hidden = SECRET.contains(&name.as_str()) && !value.is_null();
            (
                name.clone(),
                if hidden {
                    json!("**********")
                } else {
                    value.clone()
                },
            )
        });
        echo(&Value::Object(shown.collect()))
    }

    /// Notes a fault of a field, or of the whole body when `loc` is empty.
    pub fn fault(
        &mut self,
        loc: &[&str],
        kind: &'static str,
        msg: impl Into<std::borrow::Cow<'static, str>>,
        input: Value,
        ctx: Option<Value>,
    ) {
        let mut path: Vec<Value> = vec![self.root.into()];
        path.extend(loc.iter().map(|part| Value::from(*part)));
        self.faults.push(Fault {
            kind,
            loc: path,
            msg: msg.into(),
            input,
            ctx,
        });
    }

    /// Notes what a validator of ours has against a field.
    pub fn value_error(&mut self, loc: &[&str], why: &str) {
        let input = match loc.first() {
            Some(name) if SECRET.contains(name) => json!("**********"),
            Some(name) => echo(self.object.get(*name).unwrap_or(&Value::Null)),
            None => self.input(),
        };
        self.fault(
            loc,
            "value_error",
            format!("Value error, {why}"),
            input,
            Some(json!({ "error": {} })),
        );
    }

    /// `Optional[str] = None`.
    pub fn optional_string(&mut self, name: &str) -> Option<String> {
        match self.object.get(name) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                self.fault(
                    &[name],
                    "string_type",
                    "Input should be a valid string",
                    echo(other),
                    None,
                );
                None
            }
        }
    }

    /// `str`.
    pub fn required_string(&mut self, name: &str) -> Option<String> {
        match self.object.get(name) {
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                self.fault(
                    &[name],
                    "string_type",
                    "Input should be a valid string",
                    echo(other),
                    None,
                );
                None
            }
            None => {
                let input = self.input();
                self.fault(&[name], "missing", "Field required", input, None);
                None
            }
        }
    }

    /// `bool = default`.
    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        self.optional_flag(name).unwrap_or(default)
    }

    /// `Optional[StrictBool] = None`: true or false and nothing that is like it.
    pub fn optional_truth(&mut self, name: &str) -> Option<bool> {
        let given = self.object.get(name).filter(|value| !value.is_null())?;
        if given.as_bool().is_none() {
            let msg = "Input should be a valid boolean";
            self.fault(&[name], "bool_type", msg, echo(given), None);
        }
        given.as_bool()
    }

    /// `Optional[bool] = None`, with the words that pydantic takes for a truth.
    pub fn optional_flag(&mut self, name: &str) -> Option<bool> {
        let given = self.object.get(name).filter(|value| !value.is_null())?;
        let word = match given {
            Value::Bool(truth) => return Some(*truth),
            Value::Number(number) => number.to_string(),
            Value::String(text) => text.to_ascii_lowercase(),
            other => {
                let msg = "Input should be a valid boolean";
                self.fault(&[name], "bool_type", msg, echo(other), None);
                return None;
            }
        };
        match word.as_str() {
            "1" | "1.0" | "true" | "t" | "yes" | "y" | "on" => Some(true),
            "0" | "0.0" | "false" | "f" | "no" | "n" | "off" => Some(false),
            _ => {
                let msg = "Input should be a valid boolean, unable to interpret input";
                self.fault(&[name], "bool_parsing", msg, echo(given), None);
                None
            }
        }
    }

    /// `int = Field(default, ge=least, le=most)`.
    pub fn int(&mut self, name: &str, default: i64, least: i64, most: i64) -> i64 {
        let Some(given) = self.object.get(name) else {
            return default;
        };
        let number = match lax_int(given) {
            Ok(number) => number,
            Err((kind, msg)) => {
                self.fault(&[name], kind, msg, echo(given), None);
                return default;
            }
        };
        if number < least {
            let msg = format!("Input should be greater than or equal to {least}");
            self.fault(
                &[name],
                "greater_than_equal",
                msg,
                echo(given),
                Some(json!({ "ge": least })),
            );
        } else if number > most {
            let msg = format!("Input should be less than or equal to {most}");
            self.fault(
                &[name],
                "less_than_equal",
                msg,
                echo(given),
                Some(json!({ "le": most })),
            );
        }
        number
    }

    /// A string enumeration with a default.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(given) = self.object.get(name) else {
            return default;
        };
        let found = choices
            .iter()
            .find(|(text, _)| given.as_str() == Some(text));
        if let Some((_, value)) = found {
            return *value;
        }
        let names: Vec<String> = choices
            .iter()
            .map(|(text, _)| format!("'{text}'"))
            .collect();
        self.expected(name, "enum", &names, given);
        default
    }

    /// `Literal` of whole numbers, with a default.
    pub fn literal_int(&mut self, name: &str, choices: &[i64], default: i64) -> i64 {
        match self.object.get(name) {
            None | Some(Value::Null) => default,
            Some(given) => {
                let number = given.as_i64().filter(|number| choices.contains(number));
                number.unwrap_or_else(|| {
                    let names: Vec<String> = choices.iter().map(i64::to_string).collect();
                    self.expected(name, "literal_error", &names, given);
                    default
                })
            }
        }
    }

    fn expected(&mut self, name: &str, kind: &'static str, names: &[String], given: &Value) {
        let expected = match names {
            [most @ .., last] if !most.is_empty() => format!("{} or {last}", most.join(", ")),
            _ => names.join(", "),
        };
        let ctx = Some(json!({ "expected": expected }));
        self.fault(
            &[name],
            kind,
            format!("Input should be {expected}"),
            echo(given),
            ctx,
        );
    }

    /// `Optional[List[str]] = None`.
    pub fn strings(&mut self, name: &str) -> Vec<String> {
        let list = match self.object.get(name) {
            None | Some(Value::Null) => return Vec::new(),
            Some(Value::Array(list)) => list,
            Some(other) => {
                self.fault(
                    &[name],
                    "list_type",
                    "Input should be a valid list",
                    echo(other),
                    None,
                );
                return Vec::new();
            }
        };
        let mut strings = Vec::new();
        for (index, item) in list.iter().enumerate() {
            match item {
                Value::String(text) => strings.push(text.clone()),
                other => self.faults.push(Fault {
                    kind: "string_type",
                    loc: vec!["body".into(), name.into(), index.into()],
                    msg: "Input should be a valid string".into(),
                    input: echo(other),
                    ctx: None,
                }),
            }
        }
        strings
    }

    /// `Optional[Dict[str, Any]] = None`.
    pub fn object(&mut self, name: &str) -> Option<&'a Map<String, Value>> {
        match self.object.get(name) {
            None | Some(Value::Null) => None,
            Some(Value::Object(object)) => Some(object),
            Some(other) => {
                self.fault(
                    &[name],
                    "dict_type",
                    "Input should be a valid dictionary",
                    echo(other),
                    None,
                );
                None
            }
        }
    }

    /// `Optional[Dict[str, str]] = None`.
    pub fn string_map(&mut self, name: &str) -> std::collections::BTreeMap<String, String> {
        let mut map = std::collections::BTreeMap::new();
        for (key, value) in self.object(name).into_iter().flatten() {
            match value {
                Value::String(text) => {
                    map.insert(key.clone(), text.clone());
                }
                other => {
                    let input = echo(other);
                    self.fault(
                        &[name, key],
                        "string_type",
                        "Input should be a valid string",
                        input,
                        None,
                    );
                }
            }
        }
        map
    }
}

/// What was given, unless it is long.
pub fn echo(value: &Value) -> Value {
    let size = match value {
        Value::String(text) => text.len(),
        Value::Array(_) | Value::Object(_) => value.to_string().len(),
        _ => 0,
    };
    if size <= MOST_ECHO {
        value.clone()
    } else {
        json!(format!("({size} bytes)"))
    }
}

/// pydantic's idea of what is a whole number.
fn lax_int(value: &Value) -> Result<i64, (&'static str, &'static str)> {
    match value {
        Value::Bool(yes) => Ok(i64::from(*yes)),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Ok(whole),
            // Saturates: whatever is that large is out of range anyway.
            (None, Some(float)) if float.fract() == 0.0 => Ok(float as i64),
            _ => Err((
                "int_from_float",
                "Input should be a valid integer, got a number with a fractional part",
            )),
        },
        Value::String(text) => parse_int(text).ok_or((
            "int_parsing",
            "Input should be a valid integer, unable to parse string as an integer",
        )),
        _ => Err(("int_type", "Input should be a valid integer")),
    }
}

/// Digits with an optional sign, single underscores between them, blanks around, zeros after a point.
fn parse_int(text: &str) -> Option<i64> {
    let text = text.trim();
    let text = match text.split_once('.') {
        Some((whole, zeros)) if !zeros.is_empty() && zeros.bytes().all(|b| b == b'0') => whole,
        Some(_) => return None,
        None => text,
    };
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let mut number: i64 = 0;
    for part in digits.split('_') {
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        for digit in part.bytes() {
            number = number
                .saturating_mul(10)
                .saturating_add(i64::from(digit - b'0'));
        }
    }
    Some(if negative { -number } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind_of(value: Value) -> &'static str {
        let body = json!({ "n": value });
        let mut fields = Fields::of(&body).unwrap();
        fields.int("n", 7, 1, 600);
        fields.finish().err().map_or("ok", |faults| faults[0].kind)
    }

    #[test]
    fn whole_numbers_are_pydantic_s() {
        // Each as pydantic 2.14 judged it.
        let table = [
            (json!("5"), "ok"),
            (json!(" 5 "), "ok"),
            (json!("+5"), "ok"),
            (json!("1_0"), "ok"),
            (json!("5.0"), "ok"),
            (json!("5.00000"), "ok"),
            (json!("05"), "ok"),
            (json!(5.0), "ok"),
            (json!("5\u{a0}"), "ok"),
            (json!(true), "ok"),
            (json!(false), "greater_than_equal"),
            (json!("5.5"), "int_parsing"),
            (json!("x"), "int_parsing"),
            (json!("1e2"), "int_parsing"),
            (json!(""), "int_parsing"),
            (json!("٣"), "int_parsing"),
            (json!("5."), "int_parsing"),
            (json!(".5"), "int_parsing"),
            (json!("_5"), "int_parsing"),
            (json!("5__0"), "int_parsing"),
            (json!("--5"), "int_parsing"),
            (json!("0x5"), "int_parsing"),
            (json!(5.5), "int_from_float"),
            (json!(null), "int_type"),
            (json!([1]), "int_type"),
            (json!({"a": 1}), "int_type"),
            (json!(0), "greater_than_equal"),
            (json!(-0.0), "greater_than_equal"),
            (json!("-5"), "greater_than_equal"),
            (json!(601), "less_than_equal"),
            (json!(1000.0), "less_than_equal"),
            (json!("123456789012345678901234567890"), "less_than_equal"),
            (json!(123456789012345678901234567890_f64), "less_than_equal"),
        ];
        for (value, kind) in table {
            assert_eq!(kind_of(value.clone()), kind, "{value}");
        }
    }

    #[test]
    fn secrets_and_long_inputs_are_not_sent_back() {
        let body =
            json!({ "api_key": "instavm_sk_x", "env": {"A": "b"}, "command": "x".repeat(9000) });
        let fields = Fields::of(&body).unwrap();
        let shown = fields.input().to_string();
        assert!(
            !shown.contains("instavm_sk_x") && shown.len() < 5000,
            "{shown}"
        );
    }

    proptest! {
        #[test]
        fn reading_a_number_never_panics(text in "\\PC{0,30}") {
            kind_of(json!(text));
        }

        #[test]
        fn every_number_in_range_is_read(n in 1i64..=600) {
            let body = json!({ "a": n, "b": n.to_string(), "c": n as f64 });
            let mut fields = Fields::of(&body).unwrap();
            for name in ["a", "b", "c"] {
                prop_assert_eq!(fields.int(name, 0, 1, 600), n);
            }
            prop_assert!(fields.finish().is_ok());
        }
    }
}
