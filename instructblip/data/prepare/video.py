"""Videos to frames: N of them, uniformly spaced in time, RGB, upright, decoded with PyAV.

The video is cut into N segments of equal length, and each gives the frame that is on the screen at its middle. With a
constant frame rate and n frames in all that is frame floor((2 i + 1) n / 2 N) for segment i: never one past the end.
(The released loader takes evenly spaced indices of which the last is n, fails to read that one, and leaves the
channels in the order BGR.) n is counted by decoding, for what a container states may be wrong or missing.
"""

import io
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av.error
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from instructblip import images

# Containers of video files. Left out are formats that make FFmpeg open other files or addresses, such as playlists.
_FORMATS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
# A file whose frames are fewer than this share of what it states, or of its packets, was cut or damaged. Not 1: some
# containers count dropped frames. Matroska and MPEG-TS state no number: what is missing at their end is not noticed.
_SOUND_SHARE = 0.9


class VideoError(ValueError):
    """A video that cannot be kept; the message is the reason it is counted under."""


@dataclass(frozen=True)
class _Decoded:
    """One pass over a video: the time of every frame in ticks (None: not said), and the pictures of the wanted ones."""

    times: list[int | None]
    pictures: dict[int, Image.Image]


def read_frames(media: Path | bytes, frames: int) -> list[Image.Image]:
    """`frames` RGB pictures of a video in order of time, each from the middle of one of as many equal segments.

    A video with fewer frames than asked repeats some of them, still in order: the list is always `frames` long. The
    result depends on the bytes of the video alone. Costs decoding the video once, and a second time where its container
    does not say when its frames are shown.

    Args:
        media: a file, or its content.
        frames: how many, 1 or more.

    Raises:
        VideoError: missing or empty file, no video, nothing to decode, cut short or damaged, too many pixels.
    """
    if frames < 1:
        raise ValueError(f"frames={frames} must be 1 or more")
    content = _read(media)
    try:
        return _read_frames(content, frames)
    except VideoError:
        raise
    except Exception as error:  # a decoder fed with damaged bytes may raise anything; it is counted, not swallowed
        raise VideoError("video is truncated or damaged") from error


def _read_frames(content: bytes, frames: int) -> list[Image.Image]:
    guess, stated = _packet_times(content)
    decoded = _decode(content, set(middle_frames(guess, frames)))
    if not decoded.times:
        raise VideoError("video has no frame that can be decoded")
    if len(decoded.times) < _SOUND_SHARE * stated:
        raise VideoError("video is truncated or damaged")
    wanted = middle_frames(decoded.times, frames)
    if not decoded.pictures.keys() >= set(wanted):
        decoded = _decode(content, set(wanted))
    return [decoded.pictures[number] for number in wanted]


def middle_frames(times: Sequence[int | None], frames: int) -> list[int]:
    """Which of the frames shown from `times` on are on the screen at the middles of `frames` equal segments.

    The last frame is taken to last as long as the mean of the others. Where times are missing or do not grow, all frames
    are taken to last equally long.

    Returns:
        `frames` numbers in [0, len(times)), not falling; empty for no times.
    """
    total = len(times)
    known = [time for time in times if time is not None]
    if len(known) < total or any(later <= earlier for earlier, later in pairwise(known)):
        known = list(range(total))
    if total <= 1:
        return [0] * (frames * total)
    span = (known[-1] - known[0]) * total  # of the whole video, times (total - 1)
    middles = [known[0] + (2 * number + 1) * span // (2 * frames * (total - 1)) for number in range(frames)]
    return [bisect_right(known, middle) - 1 for middle in middles]


def _read(media: Path | bytes) -> bytes:
    if isinstance(media, Path):
        try:
            media = media.read_bytes()
        except FileNotFoundError:
            raise VideoError("video file is missing") from None
        except OSError as error:
            raise VideoError(f"video file cannot be read ({error.strerror})") from None
    if not media:
        raise VideoError("video file is empty")
    return media


def _open(content: bytes) -> tuple[InputContainer, VideoStream]:
    try:
        options = {"format_whitelist": _FORMATS}
        container = av.open(io.BytesIO(content), mode="r", options=options, metadata_errors="ignore")
    except av.error.FFmpegError:
        raise VideoError("file is not a readable video") from None
    stream = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
    if stream is None:
        container.close()
        raise VideoError("file has no video stream")
    if stream.codec_context is None or not stream.codec_context.width:
        container.close()
        raise VideoError("video has no frame that can be decoded")
    if stream.codec_context.width * stream.codec_context.height > images.MAX_PIXELS:
        container.close()
        raise VideoError("video has too many pixels (decompression bomb)")
    stream.codec_context.thread_count = 1  # preparation runs a process per core already
    return container, stream


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _packet_times(content: bytes) -> tuple[list[int | None], int]:
    """Times of the packets, sorted: those of the frames in most files. And the number of frames there should be."""
    container, stream = _open(content)
    times: list[int | None] = []
    with container:
        try:
            times = [packet.pts for packet in container.demux(stream) if packet.size]
        except av.error.FFmpegError:
            times = []  # decoding will tell
        stated = max(stream.frames, len(times))
    known = sorted(time for time in times if time is not None)
    return (list(known) if len(known) == len(times) else times), stated


def _decode(content: bytes, wanted: Collection[int]) -> _Decoded:
    """Decode the whole video. What a decoder cannot make sense of is left out, as players do; who calls counts."""
    times: list[int | None] = []
    pictures: dict[int, Image.Image] = {}
    container, stream = _open(content)
    with container:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.FFmpegError):
                return _Decoded(times, pictures)
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in decoded:
                if isinstance(frame, VideoFrame):
                    if len(times) in wanted:
                        pictures[len(times)] = _upright(frame)
                    times.append(frame.pts)


def _upright(frame: VideoFrame) -> Image.Image:
    """The frame as an RGB image, turned as its display matrix says (phones), in quarters."""
    quarters = round(frame.rotation / 90) % 4  # counter-clockwise
    image = frame.to_image()
    turn = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[quarters]
    return image if turn is None else image.transpose(turn)
