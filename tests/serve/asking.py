"""What is asked of servers in tests."""

WEATHER = {
    "name": "get_weather",
    "description": "Get current weather for a location.",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
OTHER = {
    "type": "function",
    "function": {
        "name": "other",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
HI = [{"role": "user", "content": "Tell me a joke."}]
COUNT = [{"role": "user", "content": "Count from 1 to 5."}]
ROME = [{"role": "user", "content": "What is the weather in Rome?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
