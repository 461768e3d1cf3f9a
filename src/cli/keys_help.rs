//! The list of configuration keys in `thaw serve --help`. The texts are the doc comments of the
//! structs that the keys are fields of, read from their source, so they exist once.

use std::collections::HashMap;

use crate::config::Config;

/// Where the structs are, and which section each one is.
const SOURCES: &[&str] = &[
    include_str!("../config.rs"),
    include_str!("../session/config.rs"),
];
const SECTIONS: &[(&str, &str)] = &[
    ("ServerConfig", "server"),
    ("AuthConfig", "auth"),
    ("DefaultPlan", "default_plan"),
    ("TaskConfig", "task"),
    ("VmConfig", "vm"),
    ("SnapshotConfig", "snapshot"),
    ("AuditConfig", "audit"),
    ("SessionConfig", "session"),
    ("PoolConfig", "session.pool"),
];

/// Every key with its default and doc.
pub fn text() -> String {
    let docs = docs();
    let mut text = String::from(
        "Configuration: each key below is set by --set KEY=VALUE, else by its environment variable\n\
         (THAW_ and the key in capitals, dots as underscores: THAW_SERVER_LISTEN), else in thaw.toml (here or\n\
         in /etc/thaw), else it is as shown. THAW_BOOTSTRAP_KEY gives the first API key instead of a minted one.\n",
    );
    let mut section = String::new();
    for key in Config::keys() {
        let of = key.path.rsplit_once('.').map_or("", |(section, _)| section);
        if of != section {
            section = of.to_owned();
            text.push('\n');
        }
        let doc = docs.get(&key.path).map_or("", String::as_str);
        text.push_str(&format!("  {} = {}\n      {doc}\n", key.path, key.default));
    }
    text
}

/// Doc comments by key.
fn docs() -> HashMap<String, String> {
    let mut docs = HashMap::new();
    for source in SOURCES {
        let mut section = None;
        let mut doc: Vec<&str> = Vec::new();
        for line in source.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("pub struct ") {
                let name = name.split([' ', '{', ';']).next().unwrap_or_default();
                section = SECTIONS
                    .iter()
                    .find(|(of, _)| *of == name)
                    .map(|(_, section)| *section);
            } else if let Some(text) = line.strip_prefix("///") {
                doc.push(text.trim());
                continue;
            } else if line.starts_with("impl ") {
                section = None;
            } else if let (Some(section), Some(field)) = (section, line.strip_prefix("pub ")) {
                let field = field.split(':').next().unwrap_or_default();
                docs.insert(format!("{section}.{field}"), doc.join(" "));
            }
            doc.clear();
        }
    }
    docs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_explained() {
        let docs = docs();
        for key in Config::keys() {
            assert!(
                docs.get(&key.path).is_some_and(|doc| !doc.is_empty()),
                "{}",
                key.path
            );
        }
        assert!(text().contains("server.listen = \"127.0.0.1:8080\""));
    }
}
