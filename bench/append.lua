-- wrk: one event per request, over AGGREGATES aggregates; prints one line of JSON at the end.
local aggregates = tonumber(os.getenv("AGGREGATES"))
local body = os.getenv("BODY")
local headers = {["Content-Type"] = "application/json"}
local failed = 0

function init(args)
  math.randomseed(tonumber(os.getenv("SEED")))
end

function request()
  return wrk.format("POST", "/v1/aggregates/a" .. math.random(0, aggregates - 1) .. "/events", headers, body)
end

function done(summary, latency, requests)
  io.write(string.format(
    '{"requests":%d,"seconds":%.6f,"failed":%d,"p50":%.3f,"p99":%.3f,"max":%.3f}\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.status + summary.errors.timeout + summary.errors.connect + summary.errors.read + summary.errors.write,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
