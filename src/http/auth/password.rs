//! Passwords, for `POST /token`. Argon2id with the crate's defaults (19 MiB, 2 passes).

use argon2::Argon2;
use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use rand::RngCore;

/// Fewest characters of a password.
const LEAST_CHARS: usize = 10;

/// Most bytes of a password that are looked at.
const MOST_BYTES: usize = 1024;

/// The hash to store, in PHC form. Takes tens of milliseconds.
///
/// # Errors
/// The password is too short or too long; one sentence.
pub fn hash(password: &str) -> Result<String, String> {
    if password.chars().count() < LEAST_CHARS {
        return Err(format!(
            "a password needs at least {LEAST_CHARS} characters"
        ));
    }
    if password.len() > MOST_BYTES {
        return Err(format!("a password has at most {MOST_BYTES} bytes"));
    }
    let mut salt = [0; 16];
    rand::rng().fill_bytes(&mut salt);
    let salt = SaltString::encode_b64(&salt).map_err(|error| error.to_string())?;
    Argon2::default()
        .hash_password(password.as_bytes(), &salt)
        .map(|hash| hash.to_string())
        .map_err(|error| error.to_string())
}

/// Whether a password is the one that was stored. Takes as long when there is none, so that the
/// time does not tell which user names exist.
pub fn matches(password: &str, stored: Option<&str>) -> bool {
    if password.len() > MOST_BYTES {
        return false;
    }
    match stored.and_then(|text| PasswordHash::new(text).ok()) {
        Some(hash) => Argon2::default()
            .verify_password(password.as_bytes(), &hash)
            .is_ok(),
        None => {
            let mut out = [0; 32];
            let spent =
                Argon2::default().hash_password_into(password.as_bytes(), &[0; 16], &mut out);
            // The result is of no interest, but the compiler must not drop the work.
            std::hint::black_box((spent.is_ok(), out));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_password_matches() {
        let stored = hash("correct horse").unwrap();
        assert!(matches("correct horse", Some(&stored)));
        assert!(!matches("wrong horse!", Some(&stored)));
        assert!(!matches("anything", None));
        assert!(!matches("anything", Some("not a hash")));
        assert!(hash("short").is_err());
    }
}
