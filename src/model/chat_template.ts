import { Template } from '@huggingface/jinja';
import { TplaError } from '../errors.js';
import { readTokenizerConfig } from './tokenizer_config.js';

export interface ChatMessage {
  role: string;
  /** Text, or parts as OpenAI writes them, of which only text parts can be rendered. */
  content?: string | null | { type: string; text?: string }[];
  [field: string]: unknown;
}

export interface RenderOptions {
  /** Ends the prompt where the assistant begins to speak. Default true. */
  addGenerationPrompt?: boolean;
  tools?: unknown[];
  /** Further variables of the template (`chat_template_kwargs`), e.g. `thinking`. */
  variables?: Record<string, unknown>;
}

/** The chat template of a checkpoint: messages in, prompt text out, special tokens included. */
export class ChatTemplate {
  readonly #templates: Map<string, Template>;
  readonly #tokens: Record<string, string>;

  /** null where the checkpoint has none. */
  static load(dir: string): ChatTemplate | null {
    const config = readTokenizerConfig(dir);
    if (config.chatTemplates.size === 0) return null;
    const templates = new Map<string, Template>();
    for (const [name, source] of config.chatTemplates) {
      try {
        templates.set(name, new Template(source));
      } catch (error) {
        throw new TplaError('CHECKPOINT_INVALID', `${dir}: chat template "${name}" cannot be parsed: ${(error as Error).message}`, { cause: error });
      }
    }
    const tokens = { bos_token: config.bosToken, eos_token: config.eosToken, pad_token: config.padToken, unk_token: config.unkToken };
    return new ChatTemplate(templates, Object.fromEntries(Object.entries(tokens).filter((entry): entry is [string, string] => entry[1] !== null)));
  }

  private constructor(templates: Map<string, Template>, tokens: Record<string, string>) {
    this.#templates = templates;
    this.#tokens = tokens;
  }

  /** Throws REQUEST_INVALID with the template's own words where it refuses the messages. */
  render(messages: ChatMessage[], options: RenderOptions = {}): string {
    const { addGenerationPrompt = true, tools, variables = {} } = options;
    const named = tools && tools.length > 0 ? this.#templates.get('tool_use') : undefined;
    const template = named ?? this.#templates.get('default') ?? [...this.#templates.values()][0]!;
    try {
      return template.render({
        ...this.#tokens,
        ...variables,
        messages: messages.map(flatten),
        // null, not absent: templates ask `tools is not none`, as transformers passes them.
        tools: tools && tools.length > 0 ? tools : null,
        documents: null,
        add_generation_prompt: addGenerationPrompt,
      });
    } catch (error) {
      if (error instanceof TplaError) throw error;
      throw new TplaError('REQUEST_INVALID', `the model's chat template refuses these messages: ${(error as Error).message}`, { cause: error, param: 'messages' });
    }
  }
}

/** Templates expect text; text parts are joined. */
function flatten(message: ChatMessage, index: number): ChatMessage {
  if (!Array.isArray(message.content)) return message;
  const texts = message.content.map((part) => {
    if (part.type === 'text' && typeof part.text === 'string') return part.text;
    throw new TplaError('REQUEST_INVALID', `messages[${index}].content: a part of type "${part.type}"; this model takes text only`, { param: 'messages' });
  });
  return { ...message, content: texts.join('') };
}
