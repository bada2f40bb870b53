//! HTTP as an operator's tools speak it: one request on one connection, and the whole answer.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::program::PATIENCE;

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its head, in lower case.
    pub head: String,
    /// Its body.
    pub body: String,
}

/// Sends bytes and reads until the other side is done.
///
/// # Panics
/// When there is no connection, or no answer in HTTP's form.
pub fn exchange(address: &str, request: &[u8]) -> Answer {
    let failed = |error: std::io::Error| panic!("http://{address}: {error}");
    let mut stream = TcpStream::connect(address).unwrap_or_else(failed);
    stream.set_read_timeout(Some(PATIENCE)).unwrap_or_else(|error| panic!("{error}"));
    // Whoever is refused early may be cut off while it still sends.
    let _ = stream.write_all(request);
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("http://{address}: expected HTTP, got `{text}`"));
    let is_chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    assert!(!is_chunked, "chunked answers are not read here");
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}

/// `GET`, with a bearer token if there is one.
pub fn fetch(address: &str, path: &str, token: Option<&str>) -> Answer {
    let token = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    exchange(
        address,
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{token}Connection: close\r\n\r\n").as_bytes(),
    )
}
