-- Prints the figures of wrk as one line of JSON. With arguments (paths), the requests take turns over these paths.
local requests, turn = {}, 0

function init(paths)
  for index, path in ipairs(paths) do
    requests[index] = wrk.format("GET", path)
  end
  if #requests > 0 then
    request = function()
      turn = turn % #requests + 1
      return requests[turn]
    end
  end
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  local line = 'RESULT {"requests":%d,"microseconds":%d,"p50":%d,"p99":%d,"failed":%d}\n'
  io.write(string.format(line, summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), failed))
end
