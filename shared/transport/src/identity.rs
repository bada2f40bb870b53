//! A device's identity: its key, its certificate, the authority it trusts and the key that signed for the aggregator
//! when it enrolled, in one PEM text for the device's store to keep. Neighbours: `authority` issues, `tls` uses.

use crate::certificate::{Certificate, read};
use commonweal_protocol::{
    AggregatorKey, CertificateChain, Csr, DeviceId, Digest, Enrolled, KeyNumber, Lineage,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use zeroize::Zeroizing;

const KEY_TAG: &str = "PRIVATE KEY";
const CERTIFICATE_TAG: &str = "CERTIFICATE";
const SIGNING_KEY_TAG: &str = "COMMONWEAL SIGNING KEY";

/// Why keys or certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A key could not be made or read.
    #[error("private key cannot be made or read")]
    Key(#[source] rcgen::Error),
    /// A certificate could not be made.
    #[error("certificate cannot be made")]
    Issue(#[source] rcgen::Error),
    /// A certificate could not be read, or is not what it should be.
    #[error("certificate: {reason}")]
    Certificate {
        /// What is wrong with it.
        reason: String,
    },
    /// A signing request is malformed, badly signed, or for a kind of key that is not accepted.
    #[error("certificate signing request: {reason}")]
    Csr {
        /// What is wrong with it.
        reason: String,
    },
    /// A PEM text is malformed or lacks a part.
    #[error("identity file: expected {expected}")]
    Pem {
        /// What should be there.
        expected: &'static str,
    },
    /// TLS does not take them.
    #[error("TLS does not take the key or the certificate")]
    Tls(#[from] rustls::Error),
    /// A time that a certificate cannot state.
    #[error("certificate time is out of range")]
    Time,
}

impl IdentityError {
    pub(crate) fn certificate(reason: impl Into<String>) -> Self {
        Self::Certificate { reason: reason.into() }
    }
}

/// A device's private key (ECDSA P-256, which phones' key stores also hold), made on the device and never sent.
pub struct DeviceKey {
    pkcs8: Zeroizing<Vec<u8>>,
}

impl DeviceKey {
    /// A new key.
    pub fn generate() -> Result<Self, IdentityError> {
        let pair =
            rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(IdentityError::Key)?;
        Ok(Self { pkcs8: Zeroizing::new(pair.serialize_der()) })
    }

    /// A request to sign this key, to send when enrolling and renewing. It names nothing: the aggregator does.
    pub fn csr(&self) -> Result<Csr, IdentityError> {
        let mut request = rcgen::CertificateParams::default();
        request.distinguished_name = rcgen::DistinguishedName::new();
        let request = request.serialize_request(&self.pair()?).map_err(IdentityError::Issue)?;
        Csr::new(request.der().to_vec()).map_err(|error| IdentityError::Csr { reason: error.to_string() })
    }

    fn pair(&self) -> Result<rcgen::KeyPair, IdentityError> {
        let der = PrivatePkcs8KeyDer::from(self.pkcs8.as_slice());
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(IdentityError::Key)
    }

    pub(crate) fn for_tls(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pkcs8.to_vec()))
    }
}

impl Clone for DeviceKey {
    fn clone(&self) -> Self {
        Self { pkcs8: Zeroizing::new(self.pkcs8.to_vec()) }
    }
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceKey(hidden)")
    }
}

/// All that a device needs to prove who it is and to know the aggregator again.
#[derive(Debug, Clone)]
pub struct Credentials {
    key: DeviceKey,
    chain: Vec<CertificateDer<'static>>,
    facts: Certificate,
    device: DeviceId,
    signing_key: AggregatorKey,
    key_number: KeyNumber,
}

impl Credentials {
    /// What enrolling yields: the key that the request was made with, and the answer. `authority` is the digest that
    /// the invitation pinned; the chain must end in that certificate.
    pub fn new(key: DeviceKey, enrolled: &Enrolled, authority: Digest) -> Result<Self, IdentityError> {
        let credentials =
            Self::assemble(key, ders(&enrolled.chain), (enrolled.key_number, enrolled.signing_key))?;
        if credentials.authority_digest() != authority {
            return Err(IdentityError::certificate("the chain does not end in the invitation's authority"));
        }
        if credentials.device != enrolled.device {
            return Err(IdentityError::certificate("the certificate names another device than the answer"));
        }
        Ok(credentials)
    }

    /// What renewing yields: the same device and authority under a fresh certificate.
    pub fn renewed(&self, key: DeviceKey, chain: &CertificateChain) -> Result<Self, IdentityError> {
        let fresh = Self::assemble(key, ders(chain), (self.key_number, self.signing_key))?;
        if fresh.authority_digest() != self.authority_digest() {
            return Err(IdentityError::certificate("the fresh chain ends in another authority"));
        }
        if fresh.device != self.device {
            return Err(IdentityError::certificate("the fresh certificate names another device"));
        }
        Ok(fresh)
    }

    fn assemble(
        key: DeviceKey,
        chain: Vec<CertificateDer<'static>>,
        (key_number, signing_key): (KeyNumber, AggregatorKey),
    ) -> Result<Self, IdentityError> {
        let [own, .., _] = chain.as_slice() else {
            return Err(IdentityError::certificate("expected the device's and the authority's"));
        };
        let facts = read(own)?;
        let device = facts.device.ok_or_else(|| IdentityError::certificate("it names no device"))?;
        if !facts.has_key(key.pair()?.public_key_raw()) {
            return Err(IdentityError::certificate("it is not for this device's key"));
        }
        Ok(Self { key, chain, facts, device, signing_key, key_number })
    }

    /// Who the device is.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// The device's private key, to make the request to renew.
    pub fn key(&self) -> &DeviceKey {
        &self.key
    }

    /// The key that signed for the aggregator when the device enrolled. Others may have followed it since.
    pub fn signing_key(&self) -> &AggregatorKey {
        &self.signing_key
    }

    /// The lineage that begins with that key.
    pub fn lineage(&self) -> Lineage {
        Lineage::new(self.key_number, self.signing_key)
    }

    /// When the certificate ends, ms since 1970.
    pub fn expires_ms(&self) -> u64 {
        self.facts.not_after_ms
    }

    /// Whether two thirds of the certificate's life are over: time to renew.
    pub fn should_renew(&self, now_ms: u64) -> bool {
        let life = self.facts.not_after_ms.saturating_sub(self.facts.not_before_ms);
        now_ms >= self.facts.not_before_ms.saturating_add(life / 3 * 2)
    }

    /// BLAKE3 of the authority's certificate.
    pub fn authority_digest(&self) -> Digest {
        Digest::of(self.authority())
    }

    pub(crate) fn authority(&self) -> &CertificateDer<'static> {
        // A chain has at least two certificates (see `assemble`).
        self.chain.last().unwrap_or(&self.chain[0])
    }

    pub(crate) fn into_chain(self) -> Vec<CertificateDer<'static>> {
        self.chain
    }

    /// One PEM text with the key, the chain and the signing key. It is a secret.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::new());
        push(&mut text, KEY_TAG, &self.key.pkcs8);
        for certificate in &self.chain {
            push(&mut text, CERTIFICATE_TAG, certificate);
        }
        let number = self.key_number.0.to_le_bytes();
        push(&mut text, SIGNING_KEY_TAG, &[self.signing_key.0.0.as_slice(), &number].concat());
        text
    }

    /// Reads what [`Credentials::to_pem`] wrote.
    pub fn from_pem(text: &str) -> Result<Self, IdentityError> {
        let parts = parts(text)?;
        let key = DeviceKey { pkcs8: Zeroizing::new(only(&parts, KEY_TAG, "one private key")?.to_vec()) };
        let chain = all(&parts, CERTIFICATE_TAG);
        let bad = || IdentityError::Pem { expected: "a signing key of 32 bytes and its number" };
        let pinned = only(&parts, SIGNING_KEY_TAG, "one signing key")?;
        let (signing_key, number) = pinned.split_first_chunk().ok_or_else(bad)?;
        let number = match number {
            // Of before keys had numbers.
            [] => 0,
            number => u64::from_le_bytes(number.try_into().map_err(|_| bad())?),
        };
        Self::assemble(key, chain, (KeyNumber(number), AggregatorKey(Digest(*signing_key))))
    }
}

fn ders(chain: &CertificateChain) -> Vec<CertificateDer<'static>> {
    chain.0.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

pub(crate) fn push(text: &mut String, tag: &str, contents: &[u8]) {
    text.push_str(&Zeroizing::new(pem::encode(&pem::Pem::new(tag, contents))));
}

pub(crate) fn parts(text: &str) -> Result<Vec<pem::Pem>, IdentityError> {
    pem::parse_many(text).map_err(|_| IdentityError::Pem { expected: "PEM text" })
}

pub(crate) fn only<'a>(
    parts: &'a [pem::Pem],
    tag: &str,
    expected: &'static str,
) -> Result<&'a [u8], IdentityError> {
    let mut found = parts.iter().filter(|part| part.tag() == tag);
    match (found.next(), found.next()) {
        (Some(part), None) => Ok(part.contents()),
        _ => Err(IdentityError::Pem { expected }),
    }
}

fn all(parts: &[pem::Pem], tag: &str) -> Vec<CertificateDer<'static>> {
    let tagged = parts.iter().filter(|part| part.tag() == tag);
    tagged.map(|part| CertificateDer::from(part.contents().to_vec())).collect()
}
