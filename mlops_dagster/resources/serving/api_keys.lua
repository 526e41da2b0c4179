-- API keys: a request must carry a key in x-api-key (or as a bearer token) whose SHA-256 is known: to the whole gateway (`clients`) or
-- to the model (the route's filter context). Keys themselves are not here.
local bit = require("bit")
local band, bor, bxor, bnot, ror, rshift = bit.band, bit.bor, bit.bxor, bit.bnot, bit.ror, bit.rshift

local clients = {
--CLIENTS--
}

-- The first 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, section 4.2.2).
local K = {
  0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
  0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
  0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
  0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
  0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
  0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
  0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
  0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
}

local function padded(message)
  local bits = #message * 8
  local zeros = (55 - #message) % 64
  return message .. "\128" .. string.rep("\0", zeros + 4)
    .. string.char(band(rshift(bits, 24), 255), band(rshift(bits, 16), 255), band(rshift(bits, 8), 255), band(bits, 255))
end

local function compress(state, message, at)
  local w = {}
  for t = 1, 16 do
    local a, b, c, d = message:byte(at + 4 * (t - 1), at + 4 * (t - 1) + 3)
    w[t] = bor(bit.lshift(a, 24), bit.lshift(b, 16), bit.lshift(c, 8), d)
  end
  for t = 17, 64 do
    local x, y = w[t - 15], w[t - 2]
    local s0 = bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
    local s1 = bxor(ror(y, 17), ror(y, 19), rshift(y, 10))
    w[t] = bit.tobit(w[t - 16] + s0 + w[t - 7] + s1)
  end
  local a, b, c, d, e, f, g, h = unpack(state)
  for t = 1, 64 do
    local s1 = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
    local t1 = bit.tobit(h + s1 + bxor(band(e, f), band(bnot(e), g)) + K[t] + w[t])
    local s0 = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
    local t2 = bit.tobit(s0 + bxor(band(a, b), band(a, c), band(b, c)))
    h, g, f, e, d, c, b, a = g, f, e, bit.tobit(d + t1), c, b, a, bit.tobit(t1 + t2)
  end
  local worked = { a, b, c, d, e, f, g, h }
  for i = 1, 8 do
    state[i] = bit.tobit(state[i] + worked[i])
  end
end

local function sha256(message)
  local state = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 }
  local whole = padded(message)
  for at = 1, #whole, 64 do
    compress(state, whole, at)
  end
  for i = 1, 8 do
    state[i] = bit.tohex(state[i])
  end
  return table.concat(state)
end

local known = {} -- digests of keys that were accepted before, in this worker's memory only, so that each is hashed once
local open = { ["/v2/health/live"] = true, ["/v2/health/ready"] = true }

local function client_of(key, of_model)
  if #key > 512 then
    return nil
  end
  local digest = known[key] or sha256(key)
  local client = clients[digest] or of_model[digest]
  if client ~= nil then
    known[key] = digest
  end
  return client
end

function envoy_on_request(handle)
  local headers = handle:headers()
  headers:remove("x-mlops-client")
  if open[headers:get(":path")] then
    return
  end
  local key = headers:get("x-api-key")
  if key == nil then
    key = (headers:get("authorization") or ""):match("^[Bb]earer (.+)$")
  end
  if key == "" then
    key = nil
  end
  local context = handle:filterContext():get("clients")
  local client = key and client_of(key, context or {})
  if client == nil then
    local told = key and "the API key is not known" or "an API key is needed: send it as x-api-key or as a bearer token"
    handle:respond({ [":status"] = "401", ["www-authenticate"] = "Bearer" }, told) -- the listener puts it into JSON
    return
  end
  headers:remove("x-api-key")
  headers:remove("authorization")
  headers:add("x-mlops-client", client)
end
