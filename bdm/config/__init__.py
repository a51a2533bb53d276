"""Strict configurations, one class for each kind of YAML file and each group of keys in it."""

from ..extras import require_packages

require_packages("a configuration")

from .bench import BENCHES as BENCHES
from .bench import BenchConfig as BenchConfig
from .bench import BenchDataConfig as BenchDataConfig
from .bench import BenchDecodeConfig as BenchDecodeConfig
from .bench import BenchDrawConfig as BenchDrawConfig
from .bench import BenchGpuConfig as BenchGpuConfig
from .bench import BenchInferConfig as BenchInferConfig
from .bench import BenchLoadConfig as BenchLoadConfig
from .bench import BenchModelConfig as BenchModelConfig
from .bench import BenchScaleConfig as BenchScaleConfig
from .bench import BenchServeConfig as BenchServeConfig
from .bench import BenchStatesConfig as BenchStatesConfig
from .bench import BenchTrainConfig as BenchTrainConfig
from .data import DataConfig as DataConfig
from .data import FolderConfig as FolderConfig
from .data import IndexConfig as IndexConfig
from .data import MixConfig as MixConfig
from .data import ParquetConfig as ParquetConfig
from .data import PicturesConfig as PicturesConfig
from .data import PreparedConfig as PreparedConfig
from .data import ShardsConfig as ShardsConfig
from .evaluation import AblationRowConfig as AblationRowConfig
from .evaluation import EvaluateConfig as EvaluateConfig
from .evaluation import LanguagesConfig as LanguagesConfig
from .evaluation import ModeConfig as ModeConfig
from .evaluation import PluginFilesConfig as PluginFilesConfig
from .evaluation import PromptsConfig as PromptsConfig
from .evaluation import RouteConfig as RouteConfig
from .evaluation import RoutesConfig as RoutesConfig
from .evaluation import read_evaluation as read_evaluation
from .filtering import FilterConfig as FilterConfig
from .reading import read_config as read_config
from .recipe import FreshEncoderConfig as FreshEncoderConfig
from .recipe import RecipeConfig as RecipeConfig
from .recipe import StartConfig as StartConfig
from .run import EvaluationConfig as EvaluationConfig
from .run import InitConfig as InitConfig
from .run import OptimizerConfig as OptimizerConfig
from .run import PrepareConfig as PrepareConfig
from .run import RunConfig as RunConfig
from .run import VocabularyConfig as VocabularyConfig
from .ship import ShipConfig as ShipConfig
from .ship import ShippedModelConfig as ShippedModelConfig
