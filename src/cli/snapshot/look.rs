//! Looking at snapshots: a list, one of them, how they descend.

use std::collections::HashSet;

use serde_json::json;

use super::super::table::{Table, human_bytes, human_date};
use super::short;
use crate::snapshots::{Catalog, Kind, Manifest};

fn seconds(snapshot: &Manifest) -> u64 {
    u64::try_from(snapshot.created_ms / 1000).unwrap_or(0)
}

fn summary(catalog: &Catalog, one: &Manifest) -> serde_json::Value {
    json!({
        "id": one.id, "name": one.name, "kind": one.kind, "tenant": one.tenant, "parent": one.parent,
        "vm_id": one.vm_id, "session_id": one.session_id, "created_at": seconds(one),
        "image": one.image_name, "machine": one.machine.name(), "memory_mib": one.memory_mib,
        "added_bytes": one.disk_bytes, "own_bytes": catalog.own_bytes(one), "chunks": one.memory.chunks.len(),
    })
}

pub(super) fn list(catalog: &Catalog, all: bool, as_json: bool) {
    let shown = |one: &&Manifest| all || one.kind == Kind::User;
    let mut table = Table::new(&[
        "ID", "NAME", "FROM", "IMAGE", "MEMORY", "ADDED", "ALONE", "MADE",
    ]);
    let mut count = 0;
    for one in catalog.snapshots.iter().filter(shown) {
        count += 1;
        if as_json {
            println!("{}", summary(catalog, one));
            continue;
        }
        let name = if one.name == one.id { "" } else { &one.name };
        table.row([
            short(&one.id),
            name.to_owned(),
            one.parent.as_deref().map(short).unwrap_or_default(),
            one.image_name.clone(),
            format!("{} MiB", one.memory_mib),
            human_bytes(one.disk_bytes),
            human_bytes(catalog.own_bytes(one)),
            human_date(seconds(one)),
        ]);
    }
    match (as_json, count) {
        (true, _) => {}
        (false, 0) => println!("no snapshots; `POST /v1/vms/{{id}}/snapshot` makes one"),
        (false, _) => print!("{table}"),
    }
}

pub(super) fn inspect(catalog: &Catalog, one: &Manifest, as_json: bool) {
    if as_json {
        let mut value = summary(catalog, one);
        value["manifest"] = json!(one);
        println!("{value}");
        return;
    }
    let mut table = Table::new(&[]);
    for (label, value) in [
        ("id", one.id.clone()),
        ("name", one.name.clone()),
        ("user", one.tenant.clone()),
        (
            "came from",
            one.parent
                .clone()
                .unwrap_or_else(|| "a template".to_owned()),
        ),
        ("VM", one.vm_id.clone()),
        ("session", one.session_id.clone()),
        ("image", format!("{} ({})", one.image_name, one.image)),
        ("machine", one.machine.name().to_owned()),
        ("memory", format!("{} MiB", one.memory_mib)),
        ("base", one.memory.base.clone()),
        ("chunks", one.memory.chunks.len().to_string()),
        ("added when made", human_bytes(one.disk_bytes)),
        ("needed by it alone", human_bytes(catalog.own_bytes(one))),
        ("processor", one.cpu.model.clone()),
        (
            "made",
            format!("{} by thaw {}", human_date(seconds(one)), one.thaw),
        ),
    ] {
        table.row([label.to_owned(), value]);
    }
    print!("{table}");
}

pub(super) fn tree(catalog: &Catalog, as_json: bool) {
    let known: HashSet<&str> = catalog
        .snapshots
        .iter()
        .map(|one| one.id.as_str())
        .collect();
    let parent = |one: &Manifest| {
        let parent = one.parent.clone();
        parent.filter(|parent| known.contains(parent.as_str()))
    };
    let roots = catalog.snapshots.iter().filter(|one| parent(one).is_none());
    let mut left: Vec<(String, bool, usize, &Manifest)> = roots
        .rev()
        .map(|one| (String::new(), true, 0, one))
        .collect();
    // Depth first; a list of what is left instead of recursion, because a lineage may be long.
    while let Some((lead, last, depth, one)) = left.pop() {
        if as_json {
            println!(
                "{}",
                json!({ "id": one.id, "name": one.name, "parent": one.parent, "depth": depth })
            );
        } else {
            let branch = match (depth, last) {
                (0, _) => "",
                (_, true) => "└─ ",
                (_, false) => "├─ ",
            };
            let name = if one.name == one.id { "" } else { &one.name };
            let gone = match &one.parent {
                Some(parent) if depth == 0 => format!("  (from {}, which is gone)", short(parent)),
                _ => String::new(),
            };
            let line = format!("{lead}{branch}{} {name}", short(&one.id));
            println!(
                "{}  +{}{gone}",
                line.trim_end(),
                human_bytes(one.disk_bytes)
            );
        }
        let below = match (depth, last) {
            (0, _) => String::new(),
            (_, true) => format!("{lead}   "),
            (_, false) => format!("{lead}│  "),
        };
        let children: Vec<&Manifest> = catalog
            .snapshots
            .iter()
            .filter(|child| parent(child).is_some_and(|parent| parent == one.id))
            .collect();
        for (number, child) in children.iter().enumerate().rev() {
            let is_last = number + 1 == children.len();
            left.push((below.clone(), is_last, depth + 1, child));
        }
    }
}
