//! An authority makes members, and what does not fit is refused.
#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use flocker_certs::{
    Authority, ClusterId, EnrolRefusal, EnrolReply, EnrolRequest, ErrorKind, Fingerprint, Identity, NewKey,
    PeerIdentity, Token, TokenError, TokenSecret,
};
use jiff::Timestamp;
use uuid::Uuid;

const DAY: Duration = Duration::from_secs(86_400);

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn authority() -> Authority {
    Authority::create(ClusterId(Uuid::from_bytes([5; 16])), now()).unwrap()
}

fn join(authority: &Authority, name: &str) -> Identity {
    let key = NewKey::generate().unwrap();
    let issued = authority.issue(&key.csr_der().unwrap(), name, now(), DAY).unwrap();
    Identity::new(key, issued.certificate, authority.certificate_der().to_vec()).unwrap()
}

fn token() -> Token {
    Token {
        cluster: ClusterId(Uuid::from_bytes([1; 16])),
        secret: TokenSecret([2; 32]),
        authority: Fingerprint([3; 32]),
        addresses: vec!["host-a:7800".to_owned(), "[fe80::1]:7800".to_owned()],
        expires: now(),
    }
}

#[test]
fn a_certificate_says_who_its_holder_is() {
    let authority = authority();
    let key = NewKey::generate().unwrap();
    let node_id = key.node_id();
    let issued = authority.issue(&key.csr_der().unwrap(), "host-a", now(), DAY).unwrap();
    let peer = PeerIdentity::from_certificate_der(&issued.certificate).unwrap();
    assert_eq!(peer.node_id, node_id);
    assert_eq!(issued.node_id, node_id);
    assert_eq!((peer.cluster, peer.name.as_str(), peer.not_after), (authority.cluster(), "host-a", now() + DAY));
}

#[test]
fn a_request_must_be_signed_by_its_key() {
    let mut request = NewKey::generate().unwrap().csr_der().unwrap();
    *request.last_mut().unwrap() ^= 1;
    let error = authority().issue(&request, "host-a", now(), DAY).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::BadSignature | ErrorKind::Malformed(_)), "{:?}", error.kind);
    assert!(matches!(authority().issue(b"nonsense", "a", now(), DAY).unwrap_err().kind, ErrorKind::Malformed(_)));
    let request = NewKey::generate().unwrap().csr_der().unwrap();
    assert!(matches!(authority().issue(&request, "a/b", now(), DAY).unwrap_err().kind, ErrorKind::InvalidName));
}

#[test]
fn an_identity_needs_its_own_key_and_authority() {
    let (ours, other) = (authority(), authority());
    let (key, stranger) = (NewKey::generate().unwrap(), NewKey::generate().unwrap());
    let issued = ours.issue(&key.csr_der().unwrap(), "host-a", now(), DAY).unwrap().certificate;
    let error = Identity::new(stranger, issued.clone(), ours.certificate_der().to_vec()).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::KeyMismatch));
    let error = Identity::new(key, issued, other.certificate_der().to_vec()).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::ForeignAuthority));
}

#[test]
fn a_renewed_identity_is_the_same_node() {
    let authority = authority();
    let old = join(&authority, "host-a");
    let later = now() + DAY;
    let issued = authority.issue(&old.csr_der().unwrap(), &old.name, later, DAY).unwrap();
    let new = old.renewed(issued.certificate).unwrap();
    assert_eq!((new.node_id, new.not_after()), (old.node_id, later + DAY));
}

#[test]
fn identity_and_authority_survive_their_files_and_keys_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let (authority_dir, node_dir) = (dir.path().join("ca"), dir.path().join("node"));
    assert!(matches!(Identity::load(&node_dir).unwrap_err().kind, ErrorKind::NotFound));
    assert!(matches!(Authority::load(&authority_dir).unwrap_err().kind, ErrorKind::NotFound));
    let authority = authority();
    authority.save(&authority_dir).unwrap();
    let identity = join(&authority, "host-a");
    identity.save(&node_dir).unwrap();
    identity.save(&node_dir).unwrap();

    let reopened = Authority::load(&authority_dir).unwrap();
    assert_eq!((reopened.fingerprint(), reopened.cluster()), (authority.fingerprint(), authority.cluster()));
    join(&reopened, "host-b");
    let loaded = Identity::load(&node_dir).unwrap();
    assert_eq!((loaded.node_id, loaded.name.as_str()), (identity.node_id, "host-a"));
    assert_eq!(loaded.authority_fingerprint(), authority.fingerprint());

    let mode = |path: std::path::PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(authority_dir.join("authority.key")), 0o600);
    assert_eq!(mode(node_dir.join("node.key")), 0o600);
    assert_eq!((mode(authority_dir.clone()), mode(node_dir.clone())), (0o700, 0o700));
    assert_eq!(fs::read_dir(&node_dir).unwrap().count(), 3);
}

#[test]
fn a_broken_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    join(&authority(), "host-a").save(dir.path()).unwrap();
    fs::write(dir.path().join("node.key"), "garbage").unwrap();
    let error = Identity::load(dir.path()).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Malformed(_)));
    assert_eq!(error.to_string(), format!("cannot read {}", dir.path().join("node.key").display()));
}

#[test]
fn secrets_are_not_in_debug_output() {
    let token = token();
    let request = EnrolRequest { token_secret: token.secret, csr: vec![], name: "a".to_owned() };
    for text in [format!("{token:?}"), format!("{request:?}")] {
        assert!(!text.contains("2, 2, 2") && text.contains(&token.id().short()), "{text}");
    }
    let text = format!("{:?} {:?}", authority(), NewKey::generate().unwrap());
    assert!(!text.contains("serialized"), "{text}");
}

#[test]
fn a_token_survives_its_text() {
    let token = token();
    let text = token.to_string();
    assert!(text.starts_with("flk1-") && !text.contains(char::is_whitespace) && text == text.to_lowercase());
    assert_eq!(text.parse::<Token>().unwrap(), token);
    assert_eq!(format!("  {}\n", text.to_uppercase().replacen("FLK", "flk", 1)).parse::<Token>().unwrap(), token);
    assert!(token.is_expired(now() + Duration::from_secs(1)) && !token.is_expired(now()));
}

#[test]
fn a_wrong_token_says_what_is_wrong() {
    let text = token().to_string();
    for wrong in ["", "hello", "flk-abc", "flkx-abc", "ssh-rsa AAAA", &"x".repeat(5000)] {
        assert_eq!(wrong.parse::<Token>().unwrap_err(), TokenError::NotAToken, "{wrong}");
    }
    for at in 5..text.len() {
        let mut damaged = text.clone().into_bytes();
        damaged[at] = if damaged[at] == b'a' { b'b' } else { b'a' };
        let damaged = String::from_utf8(damaged).unwrap();
        assert_eq!(damaged.parse::<Token>().unwrap_err(), TokenError::Damaged, "{at}");
        assert_eq!(text[..at].parse::<Token>().unwrap_err(), TokenError::Damaged, "{at}");
    }
    let newer = text.replacen("flk1-", "flk2-", 1).parse::<Token>().unwrap_err();
    assert_eq!(newer, TokenError::NewerVersion { version: "2".to_owned() });
}

#[test]
fn the_enrolment_messages_keep_their_bytes() {
    let bytes = |refusal| postcard::to_stdvec(&EnrolReply::Refused(refusal)).unwrap();
    let refusals = [
        EnrolRefusal::UnknownToken,
        EnrolRefusal::UsedToken,
        EnrolRefusal::ExpiredToken,
        EnrolRefusal::NameTaken,
        EnrolRefusal::NotAuthority,
        EnrolRefusal::InvalidName,
        EnrolRefusal::InvalidRequest,
        EnrolRefusal::Failed,
    ];
    for (number, refusal) in (0_u8..).zip(refusals) {
        assert_eq!(bytes(refusal), [1, number]);
    }
    let request = EnrolRequest { token_secret: TokenSecret([7; 32]), csr: vec![1, 2], name: "ab".to_owned() };
    let expected = [&[7; 32][..], &[2, 1, 2], &[2, b'a', b'b']].concat();
    assert_eq!(postcard::to_stdvec(&request).unwrap(), expected);
}
