// Stream capture and graphs. A graph runs its operations one after the other, in the order in which they were captured.
#include "exports.hpp"
#include "state.hpp"

using namespace driver;

Code cuStreamBeginCapture_v2(void* handle, uint32_t mode) {
  CALL(cuStreamBeginCapture_v2);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (mode > uint32_t(CaptureMode::Relaxed)) return INVALID_VALUE;
  if (stream == &stream->context->null_stream) return STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return ILLEGAL_STATE;
  auto* capture = new Capture{stream, CaptureMode(mode), std::this_thread::get_id()};
  capture->streams.insert(stream);
  stream->capture = capture;
  stream->joined = true;
  state().captures.insert(capture);
  return SUCCESS;
}

Code cuStreamEndCapture(void* handle, void** graph) {
  CALL(cuStreamEndCapture);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (!graph) return INVALID_VALUE;
  *graph = nullptr;
  Capture* capture = stream->capture;
  if (!capture || capture->origin != stream) return STREAM_CAPTURE_UNMATCHED;
  if (capture->mode != CaptureMode::Relaxed && capture->thread != std::this_thread::get_id())
    return STREAM_CAPTURE_WRONG_THREAD;
  bool joined = true;
  for (Stream* captured : capture->streams) {
    joined = joined && captured->joined;
    captured->capture = nullptr;
  }
  for (Event* event : state().events)
    if (event->capture == capture) event->capture = nullptr;
  const Code code = capture->invalid ? STREAM_CAPTURE_INVALIDATED : joined ? SUCCESS : STREAM_CAPTURE_UNJOINED;
  if (code == SUCCESS) {
    auto* made = new Graph{std::move(capture->nodes)};
    state().graphs.insert(made);
    *graph = made;
  }
  state().captures.erase(capture);
  delete capture;
  return code;
}

Code cuStreamIsCapturing(void* handle, uint32_t* status) {
  CALL(cuStreamIsCapturing);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (!status) return INVALID_VALUE;
  const Capture* capture = stream->capture;
  *status = uint32_t(!capture           ? CaptureStatus::None
                     : capture->invalid ? CaptureStatus::Invalidated
                                        : CaptureStatus::Active);
  return SUCCESS;
}

Code cuThreadExchangeStreamCaptureMode(uint32_t* mode) {
  CALL(cuThreadExchangeStreamCaptureMode);
  if (!mode || *mode > uint32_t(CaptureMode::Relaxed)) return INVALID_VALUE;
  const CaptureMode wanted = CaptureMode(*mode);
  *mode = uint32_t(thread_capture_mode);
  thread_capture_mode = wanted;
  return SUCCESS;
}

Code cuGraphInstantiateWithFlags(void** exec, void* handle, unsigned long long) {
  CALL(cuGraphInstantiateWithFlags);
  auto* graph = static_cast<Graph*>(handle);
  if (!exec || !state().graphs.count(graph)) return INVALID_VALUE;
  if (Code code = usable(current())) return code;
  auto* made = new GraphExec{current(), graph->nodes};
  state().execs.insert(made);
  *exec = made;
  return SUCCESS;
}

Code cuGraphUpload(void* exec, void* handle) {
  CALL(cuGraphUpload);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  return state().execs.count(static_cast<GraphExec*>(exec)) ? SUCCESS : INVALID_VALUE;
}

Code cuGraphLaunch(void* handle, void* stream_handle) {
  CALL(cuGraphLaunch);
  Stream* stream = nullptr;
  if (Code code = resolve(stream_handle, stream)) return code;
  auto* exec = static_cast<GraphExec*>(handle);
  if (!state().execs.count(exec)) return INVALID_VALUE;
  return enqueue(*stream, [nodes = exec->nodes] {
    for (const std::function<Code()>& node : nodes)
      if (Code code = node()) return code;
    return SUCCESS;
  });
}

Code cuGraphDestroy(void* graph) {
  CALL(cuGraphDestroy);
  if (!state().graphs.erase(static_cast<Graph*>(graph))) return INVALID_VALUE;
  delete static_cast<Graph*>(graph);
  return SUCCESS;
}

Code cuGraphExecDestroy(void* exec) {
  CALL(cuGraphExecDestroy);
  if (!state().execs.erase(static_cast<GraphExec*>(exec))) return INVALID_VALUE;
  delete static_cast<GraphExec*>(exec);
  return SUCCESS;
}
