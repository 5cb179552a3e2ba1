// Streams as queues that nothing empties but need: an operation is executed when somebody waits for it, or for what
// comes after it, and of several streams that can go on, chance picks one.
#include <algorithm>

#include "exports.hpp"
#include "state.hpp"

namespace driver {

thread_local CaptureMode thread_capture_mode = CaptureMode::Global;

Code resolve(void* handle, Stream*& stream) {
  const auto number = reinterpret_cast<uintptr_t>(handle);
  if (number == NULL_STREAM || number == LEGACY_STREAM || number == PER_THREAD_STREAM) {
    Context* context = current();
    if (Code code = usable(context)) return code;
    stream = &context->null_stream;
    if (number == PER_THREAD_STREAM) {
      std::unique_ptr<Stream>& own = context->per_thread[std::this_thread::get_id()];
      if (!own) own.reset(new Stream{context, true, {}, nullptr});
      stream = own.get();
    }
    return SUCCESS;
  }
  for (Context* context : state().contexts) {
    auto* s = static_cast<Stream*>(handle);
    if (!context->streams.count(s)) continue;
    stream = s;
    return context->sticky;
  }
  return INVALID_HANDLE;
}

namespace {

std::vector<Stream*> all_streams(Context& context) {
  std::vector<Stream*> all(context.streams.begin(), context.streams.end());
  for (auto& [thread, stream] : context.per_thread) all.push_back(stream.get());
  all.push_back(&context.null_stream);
  return all;
}

bool can_go_on(const Stream& stream) {
  if (stream.queue.empty()) return false;
  const std::vector<Marker>& waits = stream.queue.front().waits;
  return std::all_of(waits.begin(), waits.end(), [](const Marker& marker) { return *marker; });
}

}  // namespace

Code enqueue(Stream& stream, std::function<Code()> work, std::vector<Marker> waits) {
  Context& context = *stream.context;
  if (stream.capture) {
    if (stream.capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    stream.capture->nodes.push_back(std::move(work));
    stream.joined = &stream == stream.capture->origin;
    return SUCCESS;
  }
  auto wait_for = [&](const Stream& other) {
    if (other.last && !*other.last) waits.push_back(other.last);
  };
  if (&stream == &context.null_stream) {
    for (Stream* other : all_streams(context)) {
      if (other == &stream || !other->blocking) continue;
      if (other->capture) {
        other->capture->invalid = true;
        return STREAM_CAPTURE_IMPLICIT;
      }
      wait_for(*other);
    }
  } else if (stream.blocking) {
    wait_for(context.null_stream);
  }
  stream.last = std::make_shared<bool>(false);
  stream.queue.push_back({std::move(work), std::move(waits), stream.last});
  return SUCCESS;
}

bool step() {
  Driver& d = state();
  std::vector<Stream*> ready;
  for (Context* context : d.contexts)
    for (Stream* stream : all_streams(*context))
      if (can_go_on(*stream)) ready.push_back(stream);
  if (ready.empty()) return false;
  // Sets are ordered by address; chance shall not depend on it.
  Stream& stream = *ready[d.random() % ready.size()];
  Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  Context& context = *stream.context;
  // After an error of the device nothing of the context runs any more.
  if (!context.sticky && operation.work) context.sticky = operation.work();
  d.executed++;
  *operation.done = true;
  return true;
}

void run_until(const Marker& marker) {
  while (marker && !*marker && step()) {
  }
}

void drain(Stream& stream) { run_until(stream.last); }

void drain(Context& context) {
  for (Stream* stream : all_streams(context)) drain(*stream);
}

Code forbidden_on(const Stream& stream) {
  if (!stream.capture) return SUCCESS;
  stream.capture->invalid = true;
  return STREAM_CAPTURE_UNSUPPORTED;
}

Code forbidden_in_capture() {
  if (thread_capture_mode == CaptureMode::Relaxed) return SUCCESS;
  Code code = SUCCESS;
  for (Capture* capture : state().captures) {
    const bool own = capture->thread == std::this_thread::get_id() && capture->mode != CaptureMode::Relaxed;
    const bool global = capture->mode == CaptureMode::Global && thread_capture_mode == CaptureMode::Global;
    if (!own && !global) continue;
    capture->invalid = true;
    code = STREAM_CAPTURE_UNSUPPORTED;
  }
  return code;
}

namespace {

Event* event_of(void* handle) {
  auto* event = static_cast<Event*>(handle);
  return state().events.count(event) ? event : nullptr;
}

Code create_stream(void** stream, unsigned flags) {
  Context* context = current();
  if (Code code = usable(context)) return code;
  if (!stream || flags > STREAM_NON_BLOCKING) return INVALID_VALUE;
  auto* made = new Stream{context, flags != STREAM_NON_BLOCKING, {}, nullptr};
  context->streams.insert(made);
  *stream = made;
  return SUCCESS;
}

Code elapsed(float* milliseconds, void* start, void* end) {
  Event *from = event_of(start), *to = event_of(end);
  if (!from || !to || !from->recorded || !to->recorded) return INVALID_HANDLE;
  if (!milliseconds) return INVALID_VALUE;
  if (!*from->recorded || !*to->recorded) return NOT_READY;
  // A thousandth of a millisecond an operation: there is no other clock here.
  *milliseconds = float((to->at - from->at) * 1e-3);
  return SUCCESS;
}

}  // namespace
}  // namespace driver

using namespace driver;

Code cuStreamCreate(void** stream, unsigned flags) {
  CALL(cuStreamCreate);
  return create_stream(stream, flags);
}

Code cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  CALL(cuStreamCreateWithPriority);
  return create_stream(stream, flags);
}

Code cuStreamDestroy_v2(void* handle) {
  CALL(cuStreamDestroy_v2);
  Stream* stream = nullptr;
  const auto number = reinterpret_cast<uintptr_t>(handle);
  if (number <= PER_THREAD_STREAM) return INVALID_HANDLE;
  if (Code code = resolve(handle, stream); code == INVALID_HANDLE) return code;
  // The real one lets the work finish by itself later; that it is finished now is one of the legal moments.
  drain(*stream);
  if (stream->capture) stream->capture->streams.erase(stream);
  stream->context->streams.erase(stream);
  delete stream;
  return SUCCESS;
}

Code cuStreamSynchronize(void* handle) {
  CALL(cuStreamSynchronize);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (Code code = forbidden_on(*stream)) return code;
  drain(*stream);
  return stream->context->sticky;
}

Code cuStreamQuery(void* handle) {
  CALL(cuStreamQuery);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (Code code = forbidden_on(*stream)) return code;
  step();
  if (stream->context->sticky) return stream->context->sticky;
  return !stream->last || *stream->last ? SUCCESS : NOT_READY;
}

Code cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
  CALL(cuStreamWaitEvent);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  Event* event = event_of(event_handle);
  if (!event) return INVALID_HANDLE;
  if (flags) return INVALID_VALUE;
  if (event->capture) {
    Capture* capture = event->capture;
    if (stream->capture && stream->capture != capture) return STREAM_CAPTURE_ISOLATION;
    if (!stream->capture) {
      // Waiting for a captured event draws the stream into the capture.
      if (stream == &stream->context->null_stream) return STREAM_CAPTURE_IMPLICIT;
      stream->capture = capture;
      capture->streams.insert(stream);
      stream->joined = false;
    }
    // Nodes run in the order in which they were captured: there is nothing more to wait for.
    if (stream == capture->origin) event->captured_stream->joined = true;
    return SUCCESS;
  }
  if (stream->capture) {
    if (!event->recorded) return SUCCESS;
    stream->capture->invalid = true;
    return STREAM_CAPTURE_ISOLATION;
  }
  if (!event->recorded || *event->recorded) return SUCCESS;
  return enqueue(*stream, {}, {event->recorded});
}

Code cuStreamGetCtx(void* handle, void** context) {
  CALL(cuStreamGetCtx);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (!context) return INVALID_VALUE;
  *context = stream->context;
  return SUCCESS;
}

Code cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
  CALL(cuLaunchHostFunc);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (!function) return INVALID_VALUE;
  return enqueue(*stream, [=] {
    function(data);
    return SUCCESS;
  });
}

Code cuEventCreate(void** event, unsigned) {
  CALL(cuEventCreate);
  if (Code code = usable(current())) return code;
  if (!event) return INVALID_VALUE;
  auto* made = new Event{current(), nullptr};
  state().events.insert(made);
  *event = made;
  return SUCCESS;
}

Code cuEventDestroy_v2(void* handle) {
  CALL(cuEventDestroy_v2);
  Event* event = event_of(handle);
  if (!event) return INVALID_HANDLE;
  state().events.erase(event);
  delete event;
  return SUCCESS;
}

Code cuEventRecord(void* handle, void* stream_handle) {
  CALL(cuEventRecord);
  Event* event = event_of(handle);
  if (!event) return INVALID_HANDLE;
  Stream* stream = nullptr;
  if (Code code = resolve(stream_handle, stream)) return code;
  if (stream->context != event->context) return INVALID_HANDLE;
  if (stream->capture) {
    if (stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    event->capture = stream->capture;
    event->captured_stream = stream;
    return SUCCESS;
  }
  event->capture = nullptr;
  Driver& d = state();
  const Code code = enqueue(*stream, [event, &d] {
    if (d.events.count(event)) event->at = d.executed;
    return SUCCESS;
  });
  if (code == SUCCESS) event->recorded = stream->last;
  return code;
}

Code cuEventQuery(void* handle) {
  CALL(cuEventQuery);
  Event* event = event_of(handle);
  if (!event) return INVALID_HANDLE;
  if (event->capture) return CAPTURED_EVENT;
  if (!event->recorded || *event->recorded) return event->context->sticky;
  step();
  return event->context->sticky ? event->context->sticky : NOT_READY;
}

Code cuEventSynchronize(void* handle) {
  CALL(cuEventSynchronize);
  Event* event = event_of(handle);
  if (!event) return INVALID_HANDLE;
  if (event->capture) return CAPTURED_EVENT;
  run_until(event->recorded);
  return event->context->sticky;
}

Code cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  CALL(cuEventElapsedTime);
  return elapsed(milliseconds, start, end);
}

Code cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  CALL(cuEventElapsedTime_v2);
  return elapsed(milliseconds, start, end);
}
