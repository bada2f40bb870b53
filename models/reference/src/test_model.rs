//! A tiny random model for the tests of this crate, compiled once per process.

use std::{path::Path, sync::OnceLock};

use commonweal_compiler::{
    compile::{CompileOptions, compile},
    random::{RandomOptions, random},
};
use commonweal_package::Package;
use commonweal_runtime::{Library, Model, OpenOptions};

pub(crate) fn model() -> Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    let build = || {
        let folder = tempfile::tempdir().unwrap();
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/data");
        let options = RandomOptions {
            config: data.join("tiny.config.json"),
            tokenizer: data.join("bytes.tokenizer.json"),
            chat_template: Some(data.join("chatml.jinja")),
            out: folder.path().join("checkpoint"),
            seed: 2,
        };
        random(&options, &mut |_, _| ()).unwrap();
        let package = folder.path().join("package");
        compile(&CompileOptions::new(&options.out, &package)).unwrap();
        // The folder is read when a session is opened, which for training is later: it has to stay.
        let _ = folder.keep();
        let library = Library::load(None).unwrap();
        Model::open(&library, &Package::open(package).unwrap(), OpenOptions::default()).unwrap()
    };
    MODEL.get_or_init(build).clone()
}
