"""Images as commands read them."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from ._errors import CommandError


def find_images(paths: Iterable[str]) -> list[Path]:
    """Lists the files among the paths and, sorted, the images in the folders among them and in their subfolders.

    Raises:
        CommandError: A path does not exist or a folder has no images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            images = [file for file in sorted(path.rglob('*')) if _is_image(file.relative_to(path)) and file.is_file()]
            if not images:
                raise CommandError(f'there are no images in {path} (looked for {", ".join(IMG_EXTENSIONS)})')
            found += images
        else:
            found.append(path)
    return found


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith('.') for part in path.parts)
    return not hidden and path.suffix.lower() in IMG_EXTENSIONS


def read_image(path: Path, mode: str = 'RGB') -> Image.Image:
    """Reads an image upright, as viewers show it.

    Raises:
        CommandError: The file cannot be read, is not an image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I;16'):
                image = image.point(lambda level: level / 256).convert('L')  # a plain conversion clips at 255
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise CommandError(f'{path}: not an image') from error
    except FileNotFoundError as error:
        raise CommandError(f'{path}: there is no such file') from error
    except OSError as error:
        raise CommandError(f'{path}: {error.strerror or error}') from error
    except Exception as error:  # damage may raise anything in a decoder, struct.error for instance
        raise CommandError(f'{path}: damaged, or not an image: {error}') from error
