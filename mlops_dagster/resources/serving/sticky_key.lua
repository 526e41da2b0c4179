-- The sticky key of an A/B test, taken out of the request once, so that what is hashed is what is logged. The route's filter context
-- says where it is (`by`, `name`); the first value counts, as the text that it is: a quoted cookie is its text without the quotes.

-- Well-formed sequences of UTF-8 beyond ASCII (RFC 3629, section 4).
local sequences = {
  "[\194-\223][\128-\191]",
  "\224[\160-\191][\128-\191]",
  "[\225-\236\238\239][\128-\191][\128-\191]",
  "\237[\128-\159][\128-\191]",
  "\240[\144-\191][\128-\191][\128-\191]",
  "[\241-\243][\128-\191][\128-\191][\128-\191]",
  "\244[\128-\143][\128-\191][\128-\191]",
}

-- A log holds text: of a key that is none, every byte beyond ASCII is written as %XX.
local function as_text(key)
  local rest = key
  for _, sequence in ipairs(sequences) do
    rest = rest:gsub(sequence, " ")
  end
  if not rest:find("[\128-\255]") then
    return key
  end
  return (key:gsub("[\128-\255]", function(byte) return ("%%%02X"):format(byte:byte()) end))
end

local function in_cookie(headers, name)
  for number = 0, headers:getNumValues("cookie") - 1 do
    for pair in headers:getAtIndex("cookie", number):gmatch("[^;]+") do
      local found, value = pair:match("^%s*([^=]-)%s*=%s*(.-)%s*$")
      if found == name then
        return value:match('^"(.*)"$') or value
      end
    end
  end
  return nil
end

function envoy_on_request(handle)
  local headers, where = handle:headers(), handle:filterContext()
  local name = where:get("name")
  local key
  if where:get("by") == "cookie" then
    key = in_cookie(headers, name)
  else
    key = headers:getAtIndex(name:lower(), 0)
  end
  if key == nil or key == "" then
    return
  end
  key = as_text(key)
  handle:streamInfo():dynamicMetadata():set("--METADATA--", "--UNIT--", key)
  headers:add("--UNIT_HEADER--", where:get("salt") .. ":" .. key) -- which also has the route chosen again
end
