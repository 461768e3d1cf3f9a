//! API keys: how they look, how they are found, how they are compared.

use rand::distr::{Alphanumeric, SampleString};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::store::NewKey;

/// What every minted key starts with.
pub const PREFIX: &str = "instavm_sk_";

/// Characters after the prefix that find a key's row. Not secret.
const LOOKUP_CHARS: usize = 8;

/// Secret characters of a minted key: 43 of 62 kinds are 256 bits.
const SECRET_CHARS: usize = 43;

/// Fewest characters of a key that the operator chose.
const LEAST_CHARS: usize = 16;

/// Most characters of anything that is looked at as a key.
pub const MOST_CHARS: usize = 256;

/// Words that betray a key which was never replaced.
const PLACEHOLDERS: &[&str] = &[
    "changeme",
    "change-me",
    "change_me",
    "placeholder",
    "example",
    "your-api-key",
    "your_api_key",
    "yourapikey",
    "api-key-here",
    "insert",
    "replace",
    "password",
    "secret-key",
];

/// A fresh key.
pub fn mint() -> String {
    let mut rng = rand::rng();
    let body = Alphanumeric.sample_string(&mut rng, LOOKUP_CHARS + SECRET_CHARS);
    format!("{PREFIX}{body}")
}

/// What finds a key's row: the start of a minted key, or four bytes of the hash of a chosen one,
/// so that nothing of the latter is stored.
pub fn lookup(key: &str) -> String {
    let minted = key
        .strip_prefix(PREFIX)
        .filter(|body| body.len() == LOOKUP_CHARS + SECRET_CHARS)
        .and_then(|_| key.get(..PREFIX.len() + LOOKUP_CHARS));
    match minted {
        Some(start) => start.to_owned(),
        None => format!("custom_{}", hex::encode(&hash(key)[..4])),
    }
}

/// SHA-256 of the whole key.
pub fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Whether a key is the one that was stored, in time that does not depend on where they differ.
pub fn matches(key: &str, stored: &[u8]) -> bool {
    hash(key).as_slice().ct_eq(stored).into()
}

/// The row for a key.
pub fn row(key: &str, user_id: &str, name: &str, plan: Option<&str>) -> NewKey {
    NewKey {
        user_id: user_id.to_owned(),
        name: name.to_owned(),
        lookup: lookup(key),
        hash: hash(key).to_vec(),
        plan: plan.map(str::to_owned),
    }
}

/// Says what is wrong with a key that the operator chose, if anything. Never repeats the key.
///
/// # Errors
/// One sentence.
pub fn check_chosen(key: &str) -> Result<(), String> {
    let lower = key.to_ascii_lowercase();
    let kinds: std::collections::BTreeSet<char> = key.chars().collect();
    if key.len() < LEAST_CHARS {
        return Err(format!("it has fewer than {LEAST_CHARS} characters"));
    }
    if key.len() > MOST_CHARS {
        return Err(format!("it has more than {MOST_CHARS} characters"));
    }
    if !key.chars().all(|c| c.is_ascii_graphic()) {
        return Err("it has blanks, control or non-ASCII characters".into());
    }
    if kinds.len() < 6
        || key.bytes().all(|b| b.is_ascii_digit())
        || PLACEHOLDERS.iter().any(|word| lower.contains(word))
    {
        return Err("it looks like a placeholder; use a random one".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minted_keys_are_sound_and_found_by_their_start() {
        let key = mint();
        check_chosen(&key).unwrap();
        assert_eq!(key.len(), PREFIX.len() + 51);
        assert_eq!(lookup(&key), key[..19]);
        assert!(matches(&key, &hash(&key)));
        assert!(!matches(&mint(), &hash(&key)));
    }

    #[test]
    fn nothing_of_a_chosen_key_is_in_its_lookup() {
        assert_eq!(lookup("correct-horse-battery").len(), "custom_".len() + 8);
        assert!(lookup("instavm_sk_short-key").starts_with("custom_"));
        assert!(lookup("instavm_sk_é").starts_with("custom_"));
    }

    #[test]
    fn weak_keys_are_refused() {
        for bad in [
            "",
            "short",
            "changeme-changeme",
            "aaaaaaaaaaaaaaaaaaaaaa",
            "with blank in it 12",
            "your-api-key-0123",
        ] {
            assert!(check_chosen(bad).is_err(), "{bad}");
        }
        check_chosen("Zk3v9QpL0wTy7RbN").unwrap();
    }
}
