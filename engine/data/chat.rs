//! Chats as the text that a model was trained on: its own template, in Jinja, is filled in with the messages.

use crate::data::tokenizer::Tokenizer;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value as Jinja, context};
use serde_json::{Value, json};

/// A model's template for chats.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: [Jinja; 2],
}

const NAME: &str = "chat template";

/// A part of a chat's text, and whether it is to be learnt: what the assistant says is, all else is its
/// prompt.
pub type TextPart = (String, bool);

impl ChatTemplate {
    /// The template of a `tokenizer_config.json`, whose special tokens it may use; none if there is none.
    ///
    /// # Errors
    /// Says what is wrong with the template.
    pub fn from_configuration(tokenizer_configuration: &Value) -> Result<Option<Self>, String> {
        let template = match &tokenizer_configuration["chat_template"] {
            Value::String(template) => template.clone(),
            // Several by name.
            Value::Array(named) => {
                let default = named.iter().find(|named| named["name"] == "default");
                match default.and_then(|named| named["template"].as_str()) {
                    Some(template) => template.to_owned(),
                    None => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        let mut environment = Environment::new();
        // As transformers renders them.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |reason: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_template_owned(NAME, template).map_err(|error| describe(&error))?;
        let special_tokens = ["bos_token", "eos_token"].map(|key| {
            let token = &tokenizer_configuration[key];
            // A string, or an object that says more about it.
            Jinja::from(token.as_str().or(token["content"].as_str()).unwrap_or_default())
        });
        Ok(Some(Self { environment, special_tokens }))
    }

    /// The text of a list of messages, each with a `role` and a `content`; `answers` begins an answer of the
    /// assistant's after them.
    ///
    /// # Errors
    /// What the template says of the messages.
    pub fn render(&self, messages: &[Value], answers: bool) -> Result<String, String> {
        let [bos_token, eos_token] = &self.special_tokens;
        let values = context! { messages, add_generation_prompt => answers, bos_token, eos_token };
        let template = self.environment.get_template(NAME).map_err(|error| describe(&error))?;
        template.render(values).map_err(|error| describe(&error))
    }

    /// The token with which the template ends what the assistant says, if it ends it with one that is no
    /// text.
    ///
    /// # Errors
    /// What the template says of a question and an answer.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Result<Option<u32>, String> {
        // A character that means nothing to templates.
        const SAID: &str = "\u{f8ff}";
        let message = |role: &str| json!({ "role": role, "content": SAID });
        let text = self.render(&[message("user"), message("assistant")], false)?;
        let behind = text.rsplit_once(SAID).map_or("", |(_, behind)| behind.trim_start());
        let tokens = tokenizer.encode(behind.as_bytes()).map_err(|error| error.to_string())?;
        Ok(tokens.first().copied().filter(|token| tokenizer.is_added(*token)))
    }

    /// The text of a chat in parts, of which those of the assistant are to be learnt.
    ///
    /// # Errors
    /// What the template says of the messages; a chat in which the assistant says nothing; a template whose
    /// text for the first messages changes with those that follow, so that the assistant's parts cannot be
    /// told from the rest.
    pub fn parts(&self, messages: &[Value]) -> Result<Vec<TextPart>, String> {
        let mut parts = vec![];
        let mut known = String::new();
        for (number, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let texts = [
                (self.render(&messages[..number], true)?, false),
                (self.render(&messages[..=number], false)?, true),
            ];
            for (text, learnt) in texts {
                let new = text.strip_prefix(&known).ok_or_else(|| {
                    format!("the template writes what comes before message {} in two ways", number + 1)
                })?;
                parts.push((new.to_owned(), learnt));
                known = text;
            }
        }
        if parts.is_empty() {
            return Err("no message has the role \"assistant\", so there is nothing to learn".into());
        }
        Ok(parts)
    }
}

/// An error with its causes, which say the line.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The template of SmolLM2's instruct models.
    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' \
                           %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
                           Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' \
                           + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if \
                           add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn chat() -> Vec<Value> {
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        vec![
            message("user", "One?"),
            message("assistant", "Two."),
            message("user", "Three?"),
            message("assistant", "Four."),
        ]
    }

    #[test]
    fn what_the_assistant_says_is_learnt_and_the_parts_are_the_chat() {
        let template =
            ChatTemplate::from_configuration(&json!({ "chat_template": SMOLLM2 })).unwrap().unwrap();
        let parts = template.parts(&chat()).unwrap();
        let learnt: Vec<&str> = parts.iter().filter(|part| part.1).map(|part| part.0.as_str()).collect();
        assert_eq!(learnt, ["Two.<|im_end|>\n", "Four.<|im_end|>\n"]);
        let whole: String = parts.into_iter().map(|part| part.0).collect();
        assert_eq!(whole, template.render(&chat(), false).unwrap());
        assert!(whole.starts_with("<|im_start|>system\nYou are") && whole.ends_with("Four.<|im_end|>\n"));
    }

    #[test]
    fn templates_use_special_tokens_methods_of_strings_and_exceptions() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'tool' %}{{ \
                      raise_exception('no tools') }}{% endif %}\n{{ m.content.strip() | upper }}{% endfor %}";
        let configuration = json!({ "bos_token": { "content": "<s>" }, "chat_template": source });
        let template = ChatTemplate::from_configuration(&configuration).unwrap().unwrap();
        let render = |role: &str| template.render(&[json!({ "role": role, "content": " a " })], false);
        assert_eq!(render("user").unwrap(), "<s>A");
        assert!(render("tool").unwrap_err().contains("no tools"));
    }

    #[test]
    fn what_cannot_be_learnt_from_is_an_error() {
        let template = |source: &str| ChatTemplate::from_configuration(&json!({ "chat_template": source }));
        assert!(template("{% if %}").is_err());
        assert!(ChatTemplate::from_configuration(&Value::Null).unwrap().is_none());
        let plain = template("{% for m in messages %}{{ m.content }}{% endfor %}").unwrap().unwrap();
        assert!(plain.parts(&chat()[..1]).unwrap_err().contains("assistant"));
        // Says how many messages there are, first.
        let counting = template("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}");
        assert!(counting.unwrap().unwrap().parts(&chat()).unwrap_err().contains("two ways"));
    }
}
