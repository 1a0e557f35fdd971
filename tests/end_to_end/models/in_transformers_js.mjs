// What transformers.js makes of an ONNX export: arguments are the folder it is installed in and a JSON document.
import { createRequire } from "node:module";
import { dirname, basename } from "node:path";

const { AutoModelForCausalLM, AutoTokenizer, env, pipeline, Tensor } = createRequire(`${process.argv[2]}/`)("@huggingface/transformers");
const { folder, prompts, tokens, text, messages } = JSON.parse(process.argv[3]);
env.allowRemoteModels = false;
env.localModelPath = `${dirname(folder)}/`;
const options = { subfolder: "" };
const model = await AutoModelForCausalLM.from_pretrained(basename(folder), options);
const greedy = { max_new_tokens: tokens, min_new_tokens: tokens, do_sample: false };
const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const continued = [];
for (const rows of prompts) {
    const attention_mask = tensor(rows.map((row) => row.map(() => 1)));
    const output = await model.generate({ inputs: tensor(rows), attention_mask, ...greedy });
    continued.push(output.tolist().map((row) => row.map(Number)));
}
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const goesOn = await pipeline("text-generation", basename(folder), options);
const [{ generated_text }] = await goesOn(text, greedy);
const ids = tokenizer.encode(text);
const chat = messages && tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
console.log(JSON.stringify({ continued, ids, decoded: tokenizer.decode(ids, { skip_special_tokens: true }), generated_text, chat }));
