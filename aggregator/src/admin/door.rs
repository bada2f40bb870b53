//! Who may ask: whoever names the token of the state directory. In a header only, which no page of another site can
//! make a browser send. Around `routes.rs`.

use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// The token, kept as its hash: comparing hashes takes as long for one token as for another. Clones are one token, which
/// can be replaced while it is in use.
#[derive(Clone, Debug)]
pub struct Token(Arc<RwLock<blake3::Hash>>);

impl Token {
    /// This token.
    pub fn new(token: &str) -> Self {
        Self(Arc::new(RwLock::new(hash(token))))
    }

    /// From now on this one, and no longer the one before.
    pub fn replace(&self, token: &str) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hash(token);
    }

    fn opens(&self, headers: &HeaderMap) -> bool {
        let said = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let named = said
            .and_then(|said| said.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let wanted = *self.0.read().unwrap_or_else(PoisonError::into_inner);
        named.is_some_and(|(_, token)| hash(token) == wanted)
    }
}

fn hash(token: &str) -> blake3::Hash {
    blake3::hash(token.trim().as_bytes())
}

/// Lets through what names the token.
pub(super) async fn guard(State(token): State<Token>, request: Request, next: Next) -> Response {
    if token.opens(request.headers()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    let hint = "expected `Authorization: Bearer` and the token in admin.token of the state directory\n";
    (StatusCode::UNAUTHORIZED, challenge, hint).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_for_whoever_names_it() {
        let token = Token::new("secret\n");
        let opens = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            token.opens(&headers)
        };
        assert!(opens(Some("Bearer secret")) && opens(Some("bearer secret")));
        for bad in [None, Some("secret"), Some("Bearer "), Some("Bearer secret2"), Some("Basic secret")] {
            assert!(!opens(bad), "{bad:?}");
        }
        token.clone().replace("another");
        assert!(opens(Some("Bearer another")) && !opens(Some("Bearer secret")));
    }
}
