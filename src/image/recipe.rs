//! Recipes: what goes into an image, as TOML.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::embedded;

/// Longest name of an image: it becomes a file name and part of others.
const MAX_NAME: usize = 40;

/// Largest recipe file that is read, far above any that a person writes.
const MAX_FILE: u64 = 256 << 10;

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// Not TOML, or not a recipe's keys.
    #[error("{origin} is not a recipe: {source}")]
    Syntax {
        /// File or built-in recipe.
        origin: String,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{key} = {value:?} is not possible: {rule}")]
    Value {
        /// The recipe's key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        rule: &'static str,
    },
    /// No recipe of this name comes with thaw.
    #[error(
        "no recipe {name:?} comes with thaw (there are: {known}); give the path of a .toml file for one of your own"
    )]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The file cannot be read.
    #[error("cannot read the recipe {path}: {source}")]
    Read {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// What goes into an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The image's name: lower-case letters, digits and hyphens.
    pub name: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// Debian release, by code name. Its ordinary kernel must have a Xen PV entry for `pv` machines.
    pub suite: String,
    /// Debian archive to take packages from; Debian's own, with security updates, when absent.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Debian packages beyond the essential ones (which bring bash and coreutils).
    pub packages: Vec<String>,
    /// Python modules that a template imports before it is frozen.
    #[serde(default)]
    pub warm: Vec<String>,
    /// Least guest memory that boots this image, MiB.
    #[serde(default = "default_min_memory")]
    pub min_memory_mib: u32,
}

fn default_min_memory() -> u32 {
    256
}

/// A recipe with the text that it was read from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The recipe.
    pub recipe: Recipe,
    /// Its exact text: part of the key under which its image is cached.
    pub text: String,
}

impl Recipe {
    /// Reads and checks a recipe's text; `origin` names it in errors.
    ///
    /// # Errors
    /// See [`RecipeError`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, RecipeError> {
        let recipe: Self = toml::from_str(text).map_err(|source| RecipeError::Syntax {
            origin: origin.to_owned(),
            source: Box::new(source),
        })?;
        recipe.check()?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), RecipeError> {
        check_name(&self.name)?;
        check(
            "suite",
            &self.suite,
            "a Debian code name such as bookworm",
            |text| {
                !text.is_empty() && text.len() <= 40 && text.bytes().all(|b| b.is_ascii_lowercase())
            },
        )?;
        if let Some(mirror) = &self.mirror {
            check(
                "mirror",
                mirror,
                "an http:// or https:// address without spaces",
                |text| {
                    (text.starts_with("http://") || text.starts_with("https://"))
                        && text.len() <= 512
                        && text.bytes().all(|b| b.is_ascii_graphic())
                },
            )?;
        }
        for package in &self.packages {
            // Debian policy 5.6.7; it also keeps options and version suffixes out.
            check("packages", package, "a Debian package name", |text| {
                text.len() >= 2
                    && text.len() <= 128
                    && text.as_bytes()[0].is_ascii_alphanumeric()
                    && text.bytes().all(|b| {
                        b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b)
                    })
            })?;
        }
        for module in &self.warm {
            check("warm", module, "a Python module's dotted name", |text| {
                text.len() <= 128
                    && text.split('.').all(|part| {
                        !part.is_empty()
                            && !part.as_bytes()[0].is_ascii_digit()
                            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                    })
            })?;
        }
        check(
            "min_memory_mib",
            &self.min_memory_mib.to_string(),
            "64 to 8192",
            |_| (64..=8192).contains(&self.min_memory_mib),
        )
    }
}

/// Whether `name` can name an image.
///
/// # Errors
/// It is empty, too long, or holds anything but lower-case letters, digits and inner hyphens.
pub fn check_name(name: &str) -> Result<(), RecipeError> {
    check(
        "name",
        name,
        "1 to 40 lower-case letters, digits and hyphens, starting with a letter, and not starting with sha256-",
        |text| {
            text.len() <= MAX_NAME
                && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
                && !text.starts_with("sha256-")
                && text
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        },
    )
}

fn check(
    key: &'static str,
    value: &str,
    rule: &'static str,
    holds: impl FnOnce(&str) -> bool,
) -> Result<(), RecipeError> {
    if holds(value) {
        Ok(())
    } else {
        Err(RecipeError::Value {
            key,
            value: value.to_owned(),
            rule,
        })
    }
}

/// Finds a recipe: a built-in one by its name, any other by the path of its `.toml` file.
///
/// # Errors
/// See [`RecipeError`].
pub fn find(name_or_path: &str) -> Result<Source, RecipeError> {
    if name_or_path.ends_with(".toml") {
        let text = read(Path::new(name_or_path)).map_err(|source| RecipeError::Read {
            path: name_or_path.to_owned(),
            source,
        })?;
        let recipe = Recipe::parse(&text, name_or_path)?;
        return Ok(Source { recipe, text });
    }
    let file = format!("{name_or_path}.toml");
    let Some((_, bytes)) = embedded::RECIPES.iter().find(|(name, _)| *name == file) else {
        return Err(RecipeError::Unknown {
            name: name_or_path.to_owned(),
            known: embedded::RECIPES
                .iter()
                .filter_map(|(name, _)| name.strip_suffix(".toml"))
                .collect::<Vec<_>>()
                .join(", "),
        });
    };
    let text = String::from_utf8_lossy(bytes).into_owned();
    let recipe = Recipe::parse(&text, &file)?;
    Ok(Source { recipe, text })
}

fn read(path: &Path) -> std::io::Result<String> {
    let bytes = std::fs::metadata(path)?.len();
    if bytes > MAX_FILE {
        return Err(std::io::Error::other(format!(
            "it has {bytes} bytes, more than {MAX_FILE}"
        )));
    }
    std::fs::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_recipe_is_valid_and_named_like_its_file() {
        assert!(!embedded::RECIPES.is_empty());
        for (file, _) in embedded::RECIPES {
            let name = file.strip_suffix(".toml").unwrap();
            assert_eq!(find(name).unwrap().recipe.name, name);
        }
    }

    #[test]
    fn bad_input_is_refused_with_its_key() {
        let good = "name = \"a\"\nsuite = \"bookworm\"\npackages = []\n";
        assert!(Recipe::parse(good, "t").is_ok());
        for (text, named) in [
            ("name = ", "t is not a recipe"),
            ("name = \"a\"\npackages = []\n", "suite"),
            (&good.replace("\"a\"", "\"../a\""), "name"),
            (&good.replace("\"a\"", "\"sha256-a\""), "name"),
            (&good.replace("\"bookworm\"", "\"-o\""), "suite"),
            (&good.replace("\"bookworm\"", "\"book worm\""), "suite"),
            (&good.replace("[]", "[\"--option\"]"), "packages"),
            (&good.replace("[]", "[\"a b\"]"), "packages"),
            (&good.replace("[]", "[3]"), "t is not a recipe"),
            (&format!("{good}warm = [\"os; import x\"]\n"), "warm"),
            (&format!("{good}mirror = \"file:///etc\"\n"), "mirror"),
            (&format!("{good}min_memory_mib = 9000\n"), "min_memory_mib"),
            (&format!("{good}pakages = []\n"), "pakages"),
        ] {
            let error = Recipe::parse(text, "t").expect_err(text);
            assert!(error.to_string().contains(named), "{error}");
        }
        assert!(
            find("nothing-like-it")
                .unwrap_err()
                .to_string()
                .contains("minimal")
        );
        assert!(
            find("/nonexistent/x.toml")
                .unwrap_err()
                .to_string()
                .contains("/nonexistent/x.toml")
        );
    }
}
