//! Which endpoint a request is for.
//!
//! Duplicate slashes are collapsed (clients join base addresses carelessly); a trailing slash is
//! significant (this API has pairs of routes that differ in it), and nothing redirects.

use std::borrow::Cow;

use hyper::Method;

use super::error::ApiError;
use super::routes::{Endpoint, absent, endpoints};

/// A path's parameters: names and values, in the path's order.
pub type Params = Vec<(String, String)>;

/// The routes, by path and method.
#[derive(Debug)]
pub struct Router {
    paths: matchit::Router<Vec<&'static Endpoint>>,
}

impl Router {
    /// From the list of endpoints.
    ///
    /// # Errors
    /// Two paths in the list collide.
    pub fn new() -> anyhow::Result<Self> {
        let mut by_path: std::collections::BTreeMap<&str, Vec<&'static Endpoint>> =
            Default::default();
        for endpoint in endpoints() {
            by_path.entry(endpoint.path).or_default().push(endpoint);
        }
        let mut paths = matchit::Router::new();
        for (path, endpoints) in by_path {
            paths.insert(path, endpoints)?;
        }
        Ok(Self { paths })
    }

    /// The endpoint and its path's parameters, decoded.
    ///
    /// # Errors
    /// 404 for an unknown path, 405 for an unknown method.
    pub fn find(
        &self,
        method: &Method,
        path: &str,
    ) -> Result<(&'static Endpoint, Params), ApiError> {
        let path = collapse(path);
        let not_found = || ApiError::not_found(absent::why(&path).unwrap_or("Not Found"));
        let found = self.paths.at(&path).map_err(|_| not_found())?;
        let mut params = Params::new();
        for (name, value) in found.params.iter() {
            // Clients encode ids whole; what is not UTF-8 then names nothing.
            let value = percent_encoding::percent_decode_str(value)
                .decode_utf8()
                .map_err(|_| not_found())?;
            params.push((name.to_owned(), value.into_owned()));
        }
        match found
            .value
            .iter()
            .find(|endpoint| endpoint.method == method.as_str())
        {
            Some(endpoint) => Ok((endpoint, params)),
            None => {
                let methods: Vec<&str> =
                    found.value.iter().map(|endpoint| endpoint.method).collect();
                Err(ApiError::wrong_method(methods.join(", ")))
            }
        }
    }
}

fn collapse(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_their_endpoint() {
        let router = Router::new().unwrap();
        let find = |method: Method, path: &str| match router.find(&method, path) {
            Ok((endpoint, params)) => {
                let values: Vec<_> = params.into_iter().map(|(_, value)| value).collect();
                format!("{} {}", endpoint.path, values.join(" "))
            }
            Err(error) => error.status().as_str().to_owned(),
        };
        assert_eq!(find(Method::POST, "/execute"), "/execute ");
        assert_eq!(find(Method::POST, "//execute"), "/execute ");
        assert_eq!(
            find(Method::GET, "//v1///executions/x"),
            "/v1/executions/{task_id} x"
        );
        assert_eq!(
            find(Method::GET, "/v1/sessions/session/abc"),
            "/v1/sessions/session/{session_id} abc"
        );
        assert_eq!(
            find(Method::GET, "/v1/executions/a%2Fb%20%C3%A9"),
            "/v1/executions/{task_id} a/b é"
        );
        assert_eq!(find(Method::GET, "/v1/executions/%ff"), "404");
        assert_eq!(find(Method::POST, "/execute/"), "404");
        assert_eq!(find(Method::GET, "/nope"), "404");
        assert_eq!(find(Method::GET, "/execute"), "405");
        assert_eq!(find(Method::GET, "/v1/executions/a/b"), "404");
    }
}
