//! What must hold for any bytes at all in the files of a checkpoint, as somebody published them. Run by the tests below and
//! by the targets in `fuzz/`; there is no such module in an ordinary build.

use std::{
    cell::LazyCell,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use commonweal_runtime::{Chat, texts::Texts};

use crate::{
    config::{self, ConfigError},
    encoder,
    tensors::Tensors,
    tokenizer,
};

#[cfg(test)]
#[path = "../../../fuzz/mutate.rs"]
mod mutate;

/// A folder in memory where there is such a place: nothing here is worth a disk's time.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self(made.expect("a directory"))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).expect("a file");
        path
    }

    fn clear(&self) {
        for entry in fs::read_dir(self.0.path()).expect("a folder") {
            fs::remove_file(entry.expect("an entry").path()).expect("a file");
        }
    }
}

thread_local! {
    static FOLDER: LazyCell<Folder> = LazyCell::new(Folder::new);
    static CHAT: LazyCell<Chat> = LazyCell::new(|| {
        let tokens = commonweal_package::Tokens { bos: None, eos: vec![0], pad: 0 };
        Chat::of_checkpoint(TOKENIZER, "{{ messages[0]['content'] }}", &tokens).expect("a chat of our own")
    });
}

const TOKENIZER: &[u8] = include_bytes!("../goldens/tied/tokenizer.json");

/// The longest that may be said about any input but for a name that it has.
const WORDS_MAX: usize = 8192;

fn check_told(error: &dyn Error) {
    let mut whole = error.to_string();
    assert!(!whole.is_empty());
    let mut cause = error.source();
    while let Some(error) = cause {
        whole += &error.to_string();
        cause = error.source();
    }
    assert!(whole.len() < WORDS_MAX, "{whole}");
}

/// A `config.json`, and a `generation_config.json` after a zero byte, are refused by what is wrong with them, or describe a
/// model, or an encoder, that can be.
pub fn checkpoint_config(bytes: &[u8]) {
    let at = bytes.iter().position(|&byte| byte == 0);
    let (config, generation) = at.map_or((bytes, None), |at| (&bytes[..at], Some(&bytes[at + 1..])));
    FOLDER.with(|folder| {
        folder.clear();
        let path = folder.put("config.json", config);
        if let Some(generation) = &generation {
            let _ = folder.put("generation_config.json", generation);
        }
        match config::read(folder.0.path()) {
            Ok(config) => {
                config.model.check().expect("it was checked");
            }
            Err(error) => check_told(&error),
        }
        let is_encoder = encoder::is_encoder(&path);
        match encoder::read_file(&path) {
            Ok(config) => {
                config.encoder.check().expect("it was checked");
                assert!(is_encoder.expect("it was read"));
                // Each layer has its own.
                assert!(encoder::tensor_shapes(&config).len() >= config.encoder.layers);
            }
            Err(ConfigError::Architecture { .. }) => {}
            Err(error) => check_told(&error),
        }
    });
}

/// A checkpoint's weights, a file of tensors, or an index and one shard behind a zero byte, are refused by the file's or the
/// tensor's name, or can be read, all of them.
pub fn checkpoint_tensors(bytes: &[u8]) {
    let Some((which, rest)) = bytes.split_first() else { return };
    FOLDER.with(|folder| {
        folder.clear();
        if which % 2 == 0 {
            folder.put("model.safetensors", rest);
        } else {
            let at = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
            folder.put("model.safetensors.index.json", &rest[..at]);
            folder.put("a.safetensors", rest.get(at + 1..).unwrap_or_default());
        }
        let tensors = match Tensors::open(folder.0.path()) {
            Ok(tensors) => tensors,
            Err(error) => return check_told(&error),
        };
        for (name, shape) in tensors.shapes() {
            let rows = shape.first().copied().unwrap_or(1);
            match tensors.check(&name, &shape).and_then(|()| tensors.rows(&name, 0..rows)) {
                Ok(values) => assert_eq!(values.len(), shape.iter().product::<usize>()),
                Err(error) => check_told(&error),
            }
        }
    });
}

/// A `tokenizer.json` is refused by its name, or encodes and decodes.
pub fn checkpoint_tokenizer(bytes: &[u8]) {
    FOLDER.with(|folder| {
        folder.clear();
        let path = folder.put("tokenizer.json", bytes);
        match tokenizer::load(&path, 1 << 20) {
            Ok((taken, _)) => {
                let path = folder.put("tokenizer.json", &taken);
                let tokenizer = commonweal_runtime::Tokenizer::open(&path).expect("it was read");
                assert!(tokenizer.ids_end() <= 1 << 20);
                if let Ok(ids) = tokenizer.encode(&tokenizer.defuse("A text, <s>with</s> two.\n")) {
                    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.ids_end()));
                    let _ = tokenizer.decode(&ids);
                }
            }
            Err(error) => {
                assert!(error.to_string().contains("tokenizer.json"), "{error}");
                check_told(&error);
            }
        }
    });
}

/// A file of texts, as calibration reads it, gives no more tokens than are wanted and one row's, or names the line.
pub fn calibration_texts(bytes: &[u8]) {
    const TOKENS_MAX: usize = 100;
    FOLDER.with(|folder| {
        folder.clear();
        let path = folder.put("texts.jsonl", bytes);
        CHAT.with(|chat| match Texts::read(&path, chat, TOKENS_MAX) {
            Ok(texts) => {
                let before = texts.rows.split_last().map_or(&[][..], |(_, before)| before);
                assert!(before.iter().map(|row| row.ids.len()).sum::<usize>() < TOKENS_MAX);
                let rows = texts.measured(16, Some(0));
                assert!(rows.iter().all(|row| row.ids.len() <= 16 && row.ids.len() == row.weights.len()));
            }
            Err(error) => {
                assert!(error.to_string().contains("texts.jsonl"), "{error}");
                check_told(&error);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_config_target() {
        mutate::run("checkpoint_config", 5_000, checkpoint_config);
    }

    #[test]
    fn checkpoint_tensors_target() {
        mutate::run("checkpoint_tensors", 5_000, checkpoint_tensors);
    }

    #[test]
    fn checkpoint_tokenizer_target() {
        mutate::run("checkpoint_tokenizer", 1_000, checkpoint_tokenizer);
    }

    #[test]
    fn calibration_texts_target() {
        mutate::run("calibration_texts", 5_000, calibration_texts);
    }
}
