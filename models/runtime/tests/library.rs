//! Loading: what is missing, wrong or too old is a clear error, and the library contacts nobody. Each case runs in a
//! process of its own, since a process loads one library in its life.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use std::{
    collections::BTreeSet,
    env,
    num::NonZeroUsize,
    path::Path,
    process::{Command, Output, Stdio},
};

use commonweal_runtime::{Cancel, Library, LibraryError, Model, OpenOptions};

const CHILD: &str = "COMMONWEAL_TEST_CHILD";
const FILE: &str = "COMMONWEAL_TEST_FILE";

/// Runs one test of this binary again, in its own process, as the child of its parent.
fn child(test: &str, change: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(CHILD, "1").stdin(Stdio::null());
    change(&mut command);
    command.output().unwrap()
}

fn is_child() -> bool {
    env::var_os(CHILD).is_some()
}

fn passed(output: &Output) {
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{error}");
}

#[test]
fn missing_library_is_an_error_and_nothing_else_is_tried() {
    let error = Library::load(Some(Path::new("/nowhere/libonnxruntime.so")));
    // In a process that has loaded the library already, asking for another one is refused as such.
    let error = error.unwrap_err();
    assert!(matches!(error, LibraryError::Missing { .. } | LibraryError::AlreadyLoaded { .. }), "{error}");
}

#[test]
fn missing_library_of_the_variable_is_an_error() {
    if is_child() {
        let error = Library::load(None).unwrap_err();
        assert!(error.to_string().contains("/nowhere/else.so"), "{error}");
        assert!(matches!(error, LibraryError::Missing { .. }), "{error}");
        return;
    }
    passed(&child("missing_library_of_the_variable_is_an_error", |command| {
        command.env("ORT_DYLIB_PATH", "/nowhere/else.so");
    }));
}

#[test]
fn file_that_is_no_library_is_an_error() {
    if is_child() {
        let error = Library::load(Some(Path::new(&env::var_os(FILE).unwrap()))).unwrap_err();
        assert!(matches!(error, LibraryError::NotLoadable { .. }), "{error}");
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not a library").unwrap();
    passed(&child("file_that_is_no_library_is_an_error", |command| {
        command.env(FILE, file.path());
    }));
}

#[cfg(unix)]
#[test]
fn older_library_is_an_error_that_names_both_versions() {
    if is_child() {
        let error = Library::load(Some(Path::new(&env::var_os(FILE).unwrap()))).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LibraryError::TooOld { .. }), "{text}");
        assert!(text.contains("1.24 or newer, got 1.17.3"), "{text}");
        return;
    }
    // The smallest library that says it is ONNX Runtime 1.17.3.
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("old.c"), folder.path().join("libonnxruntime.so"));
    let code = "static const char *version(void) { return \"1.17.3\"; }\n\
        static const void *api(unsigned number) { return 0; }\n\
        static const struct { const void *(*api)(unsigned); const char *(*version)(void); } base = { api, version };\n\
        const void *OrtGetApiBase(void) { return &base; }\n";
    std::fs::write(&source, code).unwrap();
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(built.success());
    passed(&child("older_library_is_an_error_that_names_both_versions", |command| {
        command.env(FILE, &library);
    }));
}

#[test]
fn one_process_has_one_library_and_one_pool() {
    if is_child() {
        let first = Library::load_with(None, NonZeroUsize::new(1)).unwrap();
        assert_eq!(first.threads().get(), 1);
        assert_eq!(Library::load(Some(first.path())).unwrap().path(), first.path());
        let other = Library::load(Some(Path::new("/nowhere/else.so"))).unwrap_err();
        assert!(matches!(other, LibraryError::AlreadyLoaded { .. }), "{other}");
        let threads = Library::load_with(None, NonZeroUsize::new(2)).unwrap_err();
        assert!(matches!(threads, LibraryError::ThreadsFixed { .. }), "{threads}");
        return;
    }
    passed(&child("one_process_has_one_library_and_one_pool", |_| {}));
}

/// What this process has open that reaches outside it: sockets, and files below its home.
#[cfg(target_os = "linux")]
fn outside(home: &Path) -> BTreeSet<String> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .filter(|link| link.starts_with("socket:") || link.starts_with(&*home.to_string_lossy()))
        .collect()
}

/// Without `ORT_DISABLE_TELEMETRY`, Microsoft's 1.31.1 puts a database below the cache folder within a second and
/// queues events for a host of theirs; seen by hand on the library this project fetches.
#[cfg(target_os = "linux")]
#[test]
fn library_contacts_nobody_and_leaves_no_cache() {
    const TEST: &str = "library_contacts_nobody_and_leaves_no_cache";
    if is_child() {
        let home = env::var_os("HOME").unwrap();
        let before = outside(Path::new(&home));
        let package = commonweal_package::Package::open(env::var_os(FILE).unwrap()).unwrap();
        let model = Model::open(&support::library(), &package, OpenOptions::default()).unwrap();
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            let prepared = model.prepare(None).unwrap();
            let prompts = support::prompts(&model, &["hello"]);
            model.generate(&prepared, &prompts, &support::greedy(2), &Cancel::new()).unwrap();
            seen.extend(outside(Path::new(&home)));
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(seen, before);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (home, cache) = (folder.path().join("home"), folder.path().join("cache"));
    let built = support::build(folder.path());
    for folder in [&home, &cache] {
        std::fs::create_dir(folder).unwrap();
    }
    let output = child(TEST, |command| {
        command.env("HOME", &home).env("XDG_CACHE_HOME", &cache).env("TMPDIR", &home).env(FILE, &built);
        for variable in ["ORT_DISABLE_TELEMETRY", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"] {
            command.env_remove(variable);
        }
    });
    passed(&output);
    for folder in [&home, &cache] {
        let left: Vec<_> = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
